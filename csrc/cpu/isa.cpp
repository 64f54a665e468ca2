// Which instruction sets this CPU has, with a cap for tests.
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
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return 1;
  const bool amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  return amx && amx_granted() ? 3 : 2;
}

static std::atomic<int> cap{INT_MAX};

int isa_level() {
  static const int found = detect();
  return std::min(found, cap.load(std::memory_order_relaxed));
}

void cap_isa(int level) { cap.store(level, std::memory_order_relaxed); }

}  // namespace timo
