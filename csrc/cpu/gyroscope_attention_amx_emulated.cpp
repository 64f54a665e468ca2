// Gyroscope attention, the kernels of AMX with a model of its tiles, for tests.
#include <immintrin.h>

#include "cpu/gyroscope_attention.h"

// gcc 12 takes the undefined operands inside its own intrinsics for mistakes (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,bmi2")
#define EMULATE_AMX
#include "cpu/gyroscope_attention_tier_amx.h"

#include "cpu/gyroscope_attention_backward.h"
#include "cpu/gyroscope_attention_forward.h"

namespace timo {

void gyroscope_forward_amx_emulated(const GyroscopeArgs& a) { forward<bf16>(a); }
void gyroscope_backward_amx_emulated(const GyroscopeArgs& a) { backward<bf16>(a); }

}  // namespace timo
#pragma GCC pop_options
