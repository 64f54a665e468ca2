// One body compiled for each instruction set.
#pragma once

#define TIMO_INLINE inline __attribute__((always_inline))

namespace timo {
namespace {

// Body::run, into which everything it calls is inlined, vectorised for each instruction set.
template <class Body>
struct Tiers {
  template <class... A>
  static void portable(A&... a) {
    Body::run(a...);
  }
  template <class... A>
  __attribute__((target("avx2,fma"))) static void avx2(A&... a) {
    Body::run(a...);
  }
  template <class... A>
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) static void avx512(A&... a) {
    Body::run(a...);
  }
  template <class... A>
  static void call(int level, A&... a) {
    level >= 2 ? avx512(a...) : level == 1 ? avx2(a...) : portable(a...);
  }
};

}  // namespace
}  // namespace timo
