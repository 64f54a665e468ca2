// Which instruction sets this CPU has, and what tests change: a cap, an emulation, poisoned memory.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>

#include "ops.h"

namespace timo {

static bool amx_granted() {
  // Tile registers need the kernel's leave, once per process; threads and forks inherit it.
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

static int detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (!avx2) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return 1;
  // Products of AVX512-BF16 are twice as fast as those of float32 on AMD's CPUs, but slower than
  // them on Intel's, which have AMX instead.
  const bool pairs = __builtin_cpu_supports("avx512bf16");
  const bool amx = pairs && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  return amx && amx_granted() ? 4 : pairs && __builtin_cpu_is("amd") ? 3 : 2;
}

static std::atomic<int> cap{INT_MAX};
static std::atomic<bool> emulated{false}, poisoned{false};

static int found() {
  static const int level = detect();
  return level;
}

int isa_level() {
  return emulates_amx() ? 4 : std::min(found(), cap.load(std::memory_order_relaxed));
}

void cap_isa(int level) { cap.store(level, std::memory_order_relaxed); }

bool emulates_amx() { return emulated.load(std::memory_order_relaxed); }

bool emulate_amx(bool on) {
  const bool possible = found() >= 2;
  emulated.store(on && possible, std::memory_order_relaxed);
  return possible;
}

void poison_workspace(bool on) { poisoned.store(on, std::memory_order_relaxed); }

bool poisons_workspace() { return poisoned.load(std::memory_order_relaxed); }

}  // namespace timo
