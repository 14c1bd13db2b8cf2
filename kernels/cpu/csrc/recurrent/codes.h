// What enters a product: codes of activations, as a tier's products take them.
#pragma once

#include "recurrent/cell.h"
#include "recurrent/products.h"
#include "recurrent/shares.h"

namespace qnn {
namespace {

// How what enters a product is quantised.
struct Quantizer {
  Grid grid;        // where fixed
  int32_t low = 0;  // what is taken from a code
};

// One row of x to codes up to `most`, and its scale. Of a code's type, not of a product: those of
// 8 and of 16 bits may share it.
template <class Code>
QNN_KERNEL void quantize_row(const Recurrent& p, const Quantizer& how, int64_t row, int most,
                             Code* codes, float* scale) {
  const int64_t k = p.inputs;
  with_format(p.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Value*>(p.x) + row * k;
    if (p.scheme == Scheme::dynamic) {
      *scale = row_scale<Format>(x, k, most);
      const bool finite = *scale <= std::numeric_limits<float>::max();
      const float inverse = finite ? 1.0f / *scale : 0.0f;
      for (int64_t i = 0; i < k; i += kLanes) {
        const vint q = finite ? codes_of(load_some<Format>(x + i, k - i), inverse) : vint{};
        write_codes(codes + i, q - how.low);
      }
    } else {
      typename Format::Value odd = 0;  // NaN where x is not finite
      vfloat odds = {};
      for (int64_t i = 0; i < k; i += kLanes) {
        const vfloat v = load_some<Format>(x + i, k - i);
        const vint q = __builtin_convertvector(codes_on(how.grid, v), vint);
        write_codes(codes + i, q - how.low);
        if constexpr (std::is_same_v<Format, Float64>) {  // may be finite where v is not
          for (int64_t j = i; j < k && j < i + kLanes; ++j) odd += x[j] * 0;
        } else {
          odds += v * 0.0f;
        }
      }
      float sum = static_cast<float>(odd);
      for (int lane = 0; lane < kLanes; ++lane) sum += odds[lane];
      *scale = how.grid.scale + sum;
    }
  });
}

// One row of x as P wants it, `padded` codes long, and its scale.
template <class P>
void read_row(const Recurrent& p, const Quantizer& how, int64_t row, int64_t padded,
              typename P::Code* codes, float* scale) {
  if constexpr (!P::kQuantizes) {
    to_floats(p.dtype, p.x, row * p.inputs, p.inputs, padded, codes);
  } else {
    quantize_row(p, how, row, kMostCodeOf<P>, codes, scale);
  }
}

// What one product takes: the codes of all rows, their scales as each share has them, and what the
// shares tell each other about their columns of a row: the peak, or whether all are finite.
template <class Code>
struct Operand {
  Code* codes;
  int64_t stride;
  int32_t* marks;  // [share][row]
  float* scales;   // [share][row]
  int64_t mark_stride;
};

inline int32_t greatest(vint v) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t most = v[0];
  for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
#endif
}

// States of all shares to codes, up to `most_code`, that all shares read, and the scales of their
// rows.
template <class Code>
QNN_KERNEL void publish(const Recurrent& p, const Members& members, const Operand<Code>& to,
                        const Quantizer& how, int most_code, const float* values,
                        const Shares& shares) {
  const int64_t marks = to.mark_stride;
  const auto each = [&](const auto& work) {
    for (int share = members.begin; share < members.end; ++share) work(share, shares.of(share));
  };
  const auto of = [&](int64_t block, int64_t row) {
    return read<vfloat>(values + (block * p.batch + row) * kLanes);
  };
  if constexpr (std::is_same_v<Code, float>) {
    each([&](int, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        for (int64_t i = run.begin; i < run.end; ++i)
          write(to.codes + row * to.stride + i * kLanes, of(i, row));
      }
    });
    meet(members);
  } else if (p.scheme == Scheme::dynamic) {
    each([&](int share, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        vint most = {};
        for (int64_t i = run.begin; i < run.end; ++i) {
          const vint here = bits(of(i, row)) & 0x7fffffff;
          most = here > most ? here : most;
        }
        to.marks[share * marks + row] = greatest(most);
      }
    });
    meet(members);
    each([&](int share, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        int32_t most = 0;
        for (int other = 0; other < members.shares; ++other)
          most = to.marks[other * marks + row] > most ? to.marks[other * marks + row] : most;
        float amax;
        std::memcpy(&amax, &most, sizeof amax);
        const float scale = scale_of(amax, most_code);
        to.scales[share * marks + row] = scale;
        const bool finite = scale <= std::numeric_limits<float>::max();
        const float inverse = finite ? 1.0f / scale : 0.0f;
        for (int64_t i = run.begin; i < run.end; ++i) {
          const vint q = finite ? codes_of(of(i, row), inverse) : vint{};
          write_codes(to.codes + row * to.stride + i * kLanes, q - how.low);
        }
      }
    });
    meet(members);
  } else {
    each([&](int share, const Run& run) {
      for (int64_t row = 0; row < p.batch; ++row) {
        vfloat odds = {};
        for (int64_t i = run.begin; i < run.end; ++i) {
          const vfloat v = of(i, row);
          odds += v * 0.0f;
          const vint q = __builtin_convertvector(codes_on(how.grid, v), vint);
          write_codes(to.codes + row * to.stride + i * kLanes, q - how.low);
        }
        to.marks[share * marks + row] = greatest(bits(odds) & 0x7fffffff);
      }
    });
    meet(members);
    each([&](int share, const Run&) {
      for (int64_t row = 0; row < p.batch; ++row) {
        int32_t odd = 0;
        for (int other = 0; other < members.shares; ++other) odd |= to.marks[other * marks + row];
        to.scales[share * marks + row] =
            odd == 0 ? how.grid.scale : std::numeric_limits<float>::quiet_NaN();
      }
    });
  }
}

}  // namespace
}  // namespace qnn
