// The loops around a tier's products: an image of codes with its border, panels of the weight that
// are turned as they are used, strips of pixels, the epilogue.
//
// Work is rows of y times panels of channels; a part does some of the one and all of the other. It
// makes its own image of what it reads of x, so that no part waits for another.
#pragma once

#include "conv/couples.h"
#include "conv/image.h"
#include "conv/int16.h"
#include "conv/output.h"
#include "conv/products.h"

namespace qnn {
namespace {

template <class P>
class Convolution {
 public:
  static void magnitudes(const Conv& p, int part, int parts, int32_t* most) {
    const int64_t size = p.sample(), all = p.batch * size;
    const int64_t end = all * (part + 1) / parts;
    for (int64_t sample = 0; sample < p.batch; ++sample) most[sample] = 0;
    for (int64_t at = all * part / parts; at < end;) {
      const int64_t sample = at / size, until = smaller(end, (sample + 1) * size);
      with_format(p.x_dtype, [&](auto format) {
        using Format = decltype(format);
        const auto* x = static_cast<const typename Format::Value*>(p.x);
        const float amax = row_magnitude<Format>(x + at, until - at);
        std::memcpy(most + sample, &amax, sizeof amax);
      });
      at = until;
    }
  }

  static float scale(int32_t most) {
    float amax;
    std::memcpy(&amax, &most, sizeof amax);
    return scale_of(amax, kConvMost<P>);
  }

  static void quantize(const Conv& p, int part, int parts) {
    const int64_t size = p.sample(), all = p.batch * size, end = all * (part + 1) / parts;
    const ConvQuantizer how = fixed_grid(p, p.zero_point + 128);
    for (int64_t at = all * part / parts; at < end;) {
      const int64_t sample = at / size, until = smaller(end, (sample + 1) * size);
      with_format(p.x_dtype, [&](auto format) {
        using Format = decltype(format);
        const auto* x = static_cast<const typename Format::Value*>(p.x);
        const int32_t most =
            convert_floats<Format>(x + at, {1, until - at, 0, 0}, how, p.codes + at);
        if (most >= 0x7f800000) __atomic_store_n(p.odd + sample, 1, __ATOMIC_RELAXED);
      });
      at = until;
    }
  }

  static size_t scratch_bytes(const Conv& p, int parts) {
    size_t used = 0;
    Convolution(p, parts, Scratch(nullptr), &used);
    return used;
  }

  static void run(const Conv& p, int part, int parts, char* scratch) {
    [[maybe_unused]] const typename P::Session session;
    Convolution(p, parts, Scratch(scratch), nullptr).run_part(part, parts);
  }

 private:
  static constexpr int64_t kStrip = 64, kBandPixels = 8192, kImageBytes = 1 << 19,
                           kKeptBytes = 1 << 17;
  // Sums go on in double.
  static constexpr bool kWide = kConvMost<P> > 127;
  using Finished = std::conditional_t<kWide, Joined<P>, P>;

  // Of a group, or of some channels that are depthwise.
  struct Group {
    int64_t channel, channels, output, outputs;
  };

  const Conv& p_;
  Image<P> image_;
  int64_t groups_, panels_;  // panels of a group
  int64_t vectors_, width_;  // of a panel, at most
  int64_t run_count_;
  int64_t plane_rows_, planes_;  // rows of a plane, and whole planes, in a band at most
  bool tiled_;                   // by P::tiles
  bool by_rows_, direct_;
  bool kept_;  // all panels of a group are held at the same time, and a strip meets one by one
  int64_t panel_bytes_;
  ConvRun* runs_;
  int64_t* at_;
  float *scale_, *sw_, *bias_;
  char* panel_;
  ConvCouples couples_;  // where P::kCouples: of the panels, of which then one is held at a time
  int32_t* start_;
  char* acc_;
  double* wide_;

  QNN_ONCE Convolution(const Conv& p, int parts, Scratch scratch, size_t* used) : p_(p), image_(p) {
    const bool depthwise = image_.depthwise;
    const int64_t outputs = p.outputs / p.groups, window = p.depth() * p.taps();
    vectors_ = P::kMostVectors;
    // Where a panel is beyond the first-level cache, half as many channels by twice the pixels.
    if (P::kQuantizes && kLanes == 16 && window > 640) vectors_ = 2;
    if (depthwise) vectors_ = kStrip / kLanes;
    vectors_ = smaller(vectors_, div_up(depthwise ? p.outputs : outputs, kLanes));
    width_ = vectors_ * kLanes;
    groups_ = depthwise ? div_up(p.outputs, width_) : p.groups;
    panels_ = depthwise ? 1 : div_up(outputs, width_);
    image_.pixel = depthwise ? width_ * 4 : p.depth() * image_.code_bytes;

    tiled_ = is_tiled();
    const int64_t units = groups_ * panels_;
    by_rows_ = p.rows() >= parts && (p.pixels() >= 256 * parts || units < parts);
    bands();
    direct_ = can_be_read_directly();

    const bool split = !depthwise && p.kernel[2] > 1 && p.dilation[2] > 1;
    const int64_t pieces = P::kDepth == 0 ? 1 : div_up(window, P::kDepth);
    run_count_ = p.kernel[0] * p.kernel[1] * (split ? p.kernel[2] : 1);
    runs_ = scratch.take<ConvRun>(run_count_ + pieces);
    const int64_t pixels = smaller(planes_ * plane_rows_, p.rows()) * p.out[2];
    const int64_t most_words = p.kernel[0] * p.kernel[1] *
                               (depthwise ? words_of(p.kernel[2])
                                : split   ? p.kernel[2] * words_of(p.depth())
                                          : words_of(p.kernel[2] * p.depth()));
    const int64_t beyond =
        image_.slack() + (tiled_ ? kLanes * (image_.w.stride * image_.pixel) : 0);
    const int64_t bytes = direct_ ? 0 : planes_ * image_.plane_bytes(plane_rows_) + beyond;
    image_.memory = scratch.take<char>(bytes);
    image_.words = scratch.take<int32_t>(kLanes * image_.source_width());
    at_ = scratch.take<int64_t>(pixels);
    scale_ = scratch.take<float>(pixels);
    panel_bytes_ = most_words * width_ * 4;
    kept_ = panels_ * panel_bytes_ <= kKeptBytes;
    const int64_t held = kept_ ? panels_ : 1;
    sw_ = scratch.take<float>(held * width_);
    bias_ = scratch.take<float>(held * width_);
    start_ = scratch.take<int32_t>(held * width_);
    if constexpr (P::kCouples) {
      panel_ = scratch.take<char>(panel_bytes_);
      couples_ = ConvCouples::take(scratch, held * vectors_, most_words);
    } else {
      panel_ = scratch.take<char>(held * panel_bytes_);
    }
    // Squares of pixels and channels are turned whole, also the last of a strip.
    acc_ = scratch.take<char>((kStrip + kLanes) * width_ * 4);
    wide_ = scratch.take<double>(kWide ? kStrip * width_ : 0);
    if (used != nullptr) *used = scratch.used();
  }

  QNN_ONCE void bands() {
    const int64_t height = p_.out[1];
    int64_t most = kBandPixels / p_.out[2], low = 1, high = larger(1, smaller(most, height));
    while (low < high) {  // the most rows that fit
      const int64_t middle = (low + high + 1) / 2;
      if (image_.plane_bytes(middle) <= kImageBytes) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    plane_rows_ = div_up(height, div_up(height, low));
    planes_ = 1;
    if (plane_rows_ < height) return;
    planes_ = smaller(kImageBytes / image_.plane_bytes(height), most / height);
    planes_ = larger(1, smaller(planes_, p_.batch * p_.out[0]));
  }

  // Of runs of few words a tile would hold little but zeros.
  bool is_tiled() const {
    if (P::kTileWords == 0 || image_.depthwise) return false;
    const bool split = p_.kernel[2] > 1 && p_.dilation[2] > 1;
    return p_.depth() * (split ? 1 : p_.kernel[2]) > 2 * P::kGroup && p_.pixels() > 4;
  }

  // Words of a run of so many codes.
  int64_t words_of(int64_t codes) const {
    return round_up(div_up(codes, P::kGroup), tiled_ ? P::kTileWords : 1);
  }

  // Codes as they lie in x: each output sees one pixel, whole words of it.
  bool can_be_read_directly() const {
    bool can = P::kShifts && p_.input == ConvInput::codes && p_.x_last && p_.groups == 1 &&
               !image_.depthwise && p_.taps() == 1 && p_.depth() == words_of(p_.depth()) * 4;
    for (int axis = 0; axis < 3; ++axis)
      can = can && p_.before[axis] == 0 && (p_.out[axis] - 1) * p_.stride[axis] < p_.in[axis];
    return can;
  }

  // Depends on the rows of a plane in a band.
  QNN_ONCE void set_runs(int64_t rows) {
    const Conv& p = p_;
    const bool split = !image_.depthwise && p.kernel[2] > 1 && p.dilation[2] > 1;
    const int64_t columns = split ? p.kernel[2] : 1;
    const int64_t codes = image_.depthwise ? p.kernel[2] : p.kernel[2] / columns * p.depth();
    // Two runs go into a piece of integers, whatever their lengths.
    const int64_t most = in_pieces() ? P::kDepth * P::kGroup / (kWide ? 2 : 1) : codes;
    const int64_t step = image_.depthwise ? word_step() : 4;
    run_count_ = 0;
    for (int64_t a = 0; a < p.kernel[0]; ++a) {
      for (int64_t b = 0; b < p.kernel[1]; ++b) {
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t offset = a * image_.tap_t(rows) + b * p.dilation[1] * image_.row_bytes() +
                                 c * p.dilation[2] * image_.pixel;
          const int64_t from = ((a * p.kernel[1] + b) * columns + c) * codes;
          for (int64_t i = 0; i < codes; i += most) {
            const int64_t some = smaller(most, codes - i);
            runs_[run_count_++] = {offset + i / P::kGroup * step, words_of(some), from + i, some};
          }
        }
      }
    }
  }

  void run_part(int part, int parts) {
    const int64_t rows = p_.rows(), units = groups_ * panels_;
    const int64_t first = by_rows_ ? rows * part / parts : 0,
                  end = by_rows_ ? rows * (part + 1) / parts : rows;
    const int64_t unit = by_rows_ ? 0 : units * part / parts,
                  last = by_rows_ ? units : units * (part + 1) / parts;
    if (first >= end) return;
    for (int64_t u = unit; u < last;) {
      const int64_t group = u / panels_, until = smaller(last, (group + 1) * panels_);
      do_group(group_of(group), u - group * panels_, until - group * panels_, first, end);
      u = until;
    }
  }

  Group group_of(int64_t index) {
    if (image_.depthwise) {
      const int64_t channel = index * width_, count = smaller(width_, p_.outputs - channel);
      return {channel, count, channel, count};
    }
    const int64_t outputs = p_.outputs / p_.groups;
    return {index * p_.depth(), p_.depth(), index * outputs, outputs};
  }

  // Panels [panel, last) of a group at rows [first, end) of y.
  void do_group(const Group& group, int64_t panel, int64_t last, int64_t first, int64_t end) {
    const int64_t height = p_.out[1];
    int64_t rows_of_runs = 0;
    for (int64_t row = first; row < end;) {
      const int64_t within = row % height, left = end - row;
      int64_t rows = smaller(plane_rows_, smaller(height - within, left)), planes = 1;
      if (rows == height) planes = smaller(planes_, left / height);
      // Couples know where in the image their words are.
      const bool turns = rows_of_runs == 0 || (P::kCouples && rows != rows_of_runs);
      if (rows != rows_of_runs) set_runs(rows_of_runs = rows);
      const ConvBand band{row, rows * planes, group.channel, group.channels};
      if (!direct_) image_.fill(band, rows);
      set_pixels(band, rows);
      const int64_t pixels = band.rows * p_.out[2], strips = div_up(pixels, kStrip);
      const auto turn_one = [&](int64_t i, int64_t slot) {
        const int64_t output = i * width_;
        turn(group.output + output, smaller(width_, group.outputs - output), slot, pixels);
      };
      const auto strip = [&](int64_t i, int64_t slot, int64_t s) {
        const int64_t from = pixels * s / strips, output = i * width_;
        do_strip(band, from, pixels * (s + 1) / strips - from, group.output + output,
                 smaller(width_, group.outputs - output), slot);
      };
      if (kept_) {
        for (int64_t i = panel; turns && i < last; ++i) turn_one(i, i - panel);
        for (int64_t s = 0; s < strips; ++s) {
          for (int64_t i = panel; i < last; ++i) strip(i, i - panel, s);
        }
      } else {
        for (int64_t i = panel; i < last; ++i) {
          turn_one(i, 0);
          for (int64_t s = 0; s < strips; ++s) strip(i, 0, s);
        }
      }
      row += band.rows;
    }
  }

  void set_pixels(const ConvBand& band, int64_t rows) {
    const int64_t height = p_.out[1], planes = band.rows / rows;
    int64_t* at = at_;
    float* scale = scale_;
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t plane = band.first / height + i, sample = plane / p_.out[0];
      float of_sample = p_.sample_scale == nullptr ? p_.grid_scale : p_.sample_scale[sample];
      if (!(of_sample <= std::numeric_limits<float>::max()))
        of_sample = std::numeric_limits<float>::quiet_NaN();
      for (int64_t j = 0; j < rows; ++j) {
        int64_t from = i * image_.plane_bytes(rows) + j * image_.h.stride * image_.row_bytes();
        int64_t step = image_.w.stride * image_.pixel;
        if (direct_) {
          const int64_t z = plane % p_.out[0] * p_.stride[0],
                        y = (band.first % height + j) * p_.stride[1];
          from = ((sample * p_.in[0] + z) * p_.in[1] + y) * p_.in[2] * p_.channels;
          step = p_.stride[2] * p_.channels;
        }
        for (int64_t k = 0; k < p_.out[2]; ++k, from += step) *at++ = from, *scale++ = of_sample;
      }
    }
  }

  void turn(int64_t output, int64_t count, int64_t slot, [[maybe_unused]] int64_t pixels) {
    const int64_t vectors = div_up(count, kLanes), at = slot * width_;
    const int32_t low = P::kShifts ? -128 - p_.zero_point : 0;
    char* panel = P::kCouples ? panel_ : panel_ + slot * panel_bytes_;
    if (image_.depthwise) {
      turn_depthwise<P>(p_, output, count, vectors, runs_, run_count_, low, panel, start_ + at);
    } else {
      turn_panel<P>(p_, output, count, vectors, runs_, run_count_, low, panel, start_ + at);
      if constexpr (P::kCouples)
        find_couples<P>(runs_, run_count_, vectors, pixels, panel, couples_.from(slot * vectors_));
    }
    for (int64_t i = 0; i < vectors * kLanes; i += kLanes) {
      const int64_t left = count - i;
      write(sw_ + at + i, load_some<Float32>(p_.sw + output + i, left));
      write(bias_ + at + i, splat(-0.0f));  // which changes no value, nor a sign
      if (p_.bias == nullptr) continue;
      with_format(p_.bias_dtype, [&](auto format) {
        using Format = decltype(format);
        const auto* bias = static_cast<const typename Format::Value*>(p_.bias);
        write(bias_ + at + i, load_some<Format>(bias + output + i, left));
      });
    }
  }

  // So many pixels of a band times the panel in a slot, to y.
  void do_strip(const ConvBand& band, int64_t first, int64_t pixels, int64_t output, int64_t count,
                int64_t slot) {
    const int64_t vectors = div_up(count, kLanes), at = slot * width_;
    const char* image = direct_ ? static_cast<const char*>(p_.x) : image_.memory;
    const ConvTile strip{image,
                         at_ + first,
                         runs_,
                         run_count_,
                         panel_ + slot * panel_bytes_,
                         vectors * kLanes * 4,
                         start_ + at,
                         acc_,
                         vectors * kLanes,
                         false};
    if constexpr (P::kCouples) {
      couple_tiles<P>(vectors, pixels, strip, couples_.from(slot * vectors_));
    } else {
      multiply(vectors, pixels, strip);
    }
    const ConvPiece piece{band.first * p_.out[2] + first, pixels, output, count, vectors,
                          reinterpret_cast<float*>(acc_)};
    finish_strip<Finished>(p_, piece, sw_ + at, bias_ + at, scale_ + first);
  }

  // Whether the sums of a window are those of pieces of it. The taps of a depthwise one are few.
  bool in_pieces() const { return P::kDepth != 0 && (kWide || !image_.depthwise); }

  // Bytes from a word of a depthwise run to the next.
  int64_t word_step() const { return P::kGroup * p_.dilation[2] * image_.pixel; }

  void multiply(int64_t vectors, int64_t pixels, ConvTile strip) {
    if (!in_pieces()) return multiply_piece(vectors, pixels, strip);
    const ConvRun* const end = runs_ + run_count_;
    const int64_t sums = pixels * vectors * kLanes;
    auto* const acc = reinterpret_cast<int32_t*>(acc_);
    while (strip.runs != end) {
      int64_t words = strip.runs->words;
      const ConvRun* last = strip.runs + 1;
      // Integers of at most so many words; of floats about as many.
      while (last != end && (kWide ? words + last->words : words + 1) <= P::kDepth)
        words += last++->words;
      strip.run_count = last - strip.runs;
      multiply_piece(vectors, pixels, strip);
      if (kWide && last == end && !strip.more)
        return join_sums(acc, sums, reinterpret_cast<float*>(acc_));
      if (kWide) add_sums(acc, sums, strip.more, wide_);
      strip.runs = last;
      strip.panel += words * vectors * kLanes * 4;
      strip.more = true;
    }
    if (kWide) join_sums(wide_, sums, reinterpret_cast<float*>(acc_));
  }

  void multiply_piece(int64_t vectors, int64_t pixels, const ConvTile& strip) {
    if (image_.depthwise) return depthwise_tiles<P>(vectors, pixels, strip, word_step());
    if constexpr (P::kTileWords != 0) {
      if (tiled_ && P::tiles(vectors, pixels, strip, !direct_)) return;
    }
    conv_tiles<P>(vectors, pixels, strip);
  }
};

template <class P>
constexpr ConvKernel conv() {
  using C = Convolution<P>;
  if constexpr (kConvMost<P> > 127) {
    return {C::magnitudes, C::scale, nullptr, C::scratch_bytes, C::run};
  } else if constexpr (P::kQuantizes) {
    return {C::magnitudes, C::scale, C::quantize, C::scratch_bytes, C::run};
  } else {
    return {nullptr, nullptr, nullptr, C::scratch_bytes, C::run};
  }
}

}  // namespace
}  // namespace qnn
