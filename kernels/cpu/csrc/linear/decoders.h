// The decoders of weights.
#pragma once

#include "linear/decoders/e2m1.h"
#include "linear/decoders/e4m3.h"
#include "linear/decoders/int4.h"
#include "linear/decoders/int8.h"

namespace qnn {
namespace {

template <class... D>
struct DecoderList {
  // The most codes of a step: what rows of x are padded to.
  static constexpr int64_t kStep = [] {
    int64_t most = 0;
    ((most = larger(most, D::kStep)), ...);
    return most;
  }();

  template <class Run>
  static void with(Decoder which, const Run& run) {
    ((which == D::kDecoder ? run(D{}) : void()), ...);
  }
};

using AllDecoders = DecoderList<Int8Codes, E4m3Codes, E2m1Codes, Int4Codes>;

}  // namespace
}  // namespace qnn
