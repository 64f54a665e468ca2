// Stands in for the CUDA runtime, so that csrc/cuda/*.cu run on a CPU in tests.
//
// The threads of a block are fibers. Each runs until it waits: at a barrier of the block, or for the
// lanes of its warp. Blocks, warps and lanes run in the order that `order` says, a warp as far as it
// can before the next, so that a result which depends on it differs between orders. A launch throws where the threads of a block wait at
// different places or leave while others wait, where a lane that a mask names does not come, where
// memory beside the dynamic shared memory is written, and where a thread touches memory that is not
// there or that its type is not aligned to. Shared memory is NaN when a block begins. One launch at
// a time.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dtype.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))
#define CUDA_EMULATION_TEXT(x) #x
#define CUDA_EMULATION_LINE(x) CUDA_EMULATION_TEXT(x)
#define CUDA_EMULATION_HERE __FILE__ ":" CUDA_EMULATION_LINE(__LINE__)
#define __syncthreads() cuda_emulation::wait(0, CUDA_EMULATION_HERE)
#define __shfl_down_sync(mask, x, step) \
  cuda_emulation::shuffle_down(mask, x, step, CUDA_EMULATION_HERE)
#define __ballot_sync(mask, x) cuda_emulation::ballot(mask, x, CUDA_EMULATION_HERE)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

// Static shared memory of all kernels, by the linker.
extern "C" char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_emulation {

constexpr int most_threads = 1024;
constexpr size_t stack_bytes = 1 << 16, guard = 64, most_shared = 49152;

enum class State { fresh, ready, waiting, done };

struct Thread {
  State state;
  unsigned mask;      // lanes it waits for; 0: all threads of the block
  const char* where;  // it waits
  unsigned turn;      // parity of its exchanges between lanes
  uint64_t given[2];
  jmp_buf at;
  ucontext_t start;
};

inline int order = 0;  // 0 forward, 1 reverse, 2 shuffled
inline cudaError_t last_error = cudaSuccess;
inline std::vector<Thread> threads(most_threads);
inline char* stacks = nullptr;
inline Thread* current = nullptr;
inline jmp_buf scheduler;
inline void (*body)(const void*);
inline const void* arguments;
inline std::vector<unsigned char> dynamic;
inline volatile int fault = 0;  // the signal
inline void* volatile fault_at = nullptr;

inline void* dynamic_shared() { return dynamic.data() + guard; }

// Back to the scheduler, until it releases this thread.
inline void wait(unsigned mask, const char* where) {
  current->mask = mask, current->where = where, current->state = State::waiting;
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

// Hands x to the lanes of the warp, in one of two slots: a lane may give again before another has
// taken. Returns the slot.
template <class T>
int exchange(unsigned mask, T x, const char* where) {
  static_assert(sizeof(T) <= 8);
  const int lane = static_cast<int>(current - threads.data()) % 32;
  if (!(mask >> lane & 1)) throw std::logic_error("a lane outside its own mask");
  const unsigned turn = current->turn++ % 2;
  std::memcpy(&current->given[turn], &x, sizeof(T));
  wait(mask, where);
  return turn;
}

inline Thread& lane(int i) { return current[i - static_cast<int>(current - threads.data()) % 32]; }

template <class T>
T shuffle_down(unsigned mask, T x, int step, const char* where) {
  const int turn = exchange(mask, x, where);
  const int from = static_cast<int>(current - threads.data()) % 32 + step;
  if (from < 32) std::memcpy(&x, &lane(from).given[turn], sizeof(T));
  return x;
}

inline unsigned ballot(unsigned mask, bool x, const char* where) {
  const int turn = exchange(mask, static_cast<uint64_t>(x), where);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(lane(i).given[turn]) << i;
  return votes;
}

inline void enter() {
  body(arguments);
  current->state = State::done;
  _longjmp(scheduler, 1);
}

inline void on_fault(int signal, siginfo_t* info, void*) {
  fault = signal, fault_at = info->si_addr;
  _longjmp(scheduler, 1);
}

// Faults of threads come to on_fault while this lives.
struct Faults {
  static constexpr int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction before[4];
  stack_t stack_before;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Faults() {
    stack_t own{};
    own.ss_sp = stack.data(), own.ss_size = stack.size();
    sigaltstack(&own, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &before[i]);
  }
  ~Faults() {
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

[[noreturn]] inline void fail(const std::string& what) {
  const auto text = [](const dim3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  throw std::runtime_error("block " + text(blockIdx) + ", thread " + text(threadIdx) + ": " + what);
}

inline void resume(int i) {
  current = &threads[i];
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  if (!_setjmp(scheduler)) {
    const bool fresh = current->state == State::fresh;
    current->state = State::ready;
    if (!fresh) _longjmp(current->at, 1);
    getcontext(&current->start);
    current->start.uc_stack.ss_sp = stacks + i * stack_bytes;
    current->start.uc_stack.ss_size = stack_bytes;
    makecontext(&current->start, enter, 0);
    setcontext(&current->start);
  }
  if (!fault) return;
  const int signal = fault;
  fault = 0;
  char at[32];
  snprintf(at, sizeof at, "%p", fault_at);
  fail(signal == SIGSEGV || signal == SIGBUS ? std::string("touches memory at ") + at
       : signal == SIGFPE ? "divides by zero"
                          : "an address that is not aligned, an index beyond an array or a signed "
                            "overflow");
}

inline bool apart(const char* here, const char* there) {
  return here != there && std::strcmp(here, there);
}

// Whether all that thread i waits for, the lanes of its mask or the block, wait at the same place.
inline bool complete(int i, int count) {
  const Thread& own = threads[i];
  const int first = own.mask ? i / 32 * 32 : 0, last = own.mask ? first + 32 : count;
  for (int j = first; j < last; ++j) {
    if (own.mask && !(own.mask >> (j - first) & 1)) continue;
    if (j >= count || threads[j].state == State::done) {
      threadIdx = {static_cast<unsigned>(j), 0, 0};
      fail(std::string("left while others wait at ") + own.where);
    }
    if (threads[j].mask != own.mask || apart(threads[j].where, own.where)) return false;
  }
  return true;
}

inline std::vector<int64_t> sequence(int64_t first, int64_t last) {
  std::vector<int64_t> all(last - first);
  std::iota(all.begin(), all.end(), first);
  if (order == 1) std::reverse(all.begin(), all.end());
  if (order == 2) std::shuffle(all.begin(), all.end(), std::mt19937(last));
  return all;
}

// Lets a warp run ahead of the others, as far as it can.
inline void run_warp(int first, int count) {
  const auto lanes = sequence(first, std::min(first + 32, count));
  for (bool again = true; again;) {
    for (const int64_t i : lanes)
      if (threads[i].state == State::fresh || threads[i].state == State::ready) resume(i);
    again = false;
    for (const int64_t i : lanes)
      if (threads[i].state == State::waiting && threads[i].mask && complete(i, count))
        threads[i].state = State::ready, again = true;
  }
}

inline void run_block(int count) {
  std::fill(dynamic.begin(), dynamic.end(), 0xff);
  std::memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
  for (int i = 0; i < count; ++i) threads[i].state = State::fresh, threads[i].turn = 0;
  for (;;) {
    for (const int64_t warp : sequence(0, (count + 31) / 32)) run_warp(warp * 32, count);
    int first = 0;  // that waits
    while (first < count && threads[first].state == State::done) ++first;
    if (first == count) break;
    if (threads[first].mask || !complete(first, count)) {
      const char* where = threads[first].where;
      for (int i = first; i < count; ++i)
        if (apart(threads[i].where, where))
          fail(std::string("threads wait at ") + threads[i].where + " and " + where);
      fail(std::string("lanes differ in their masks at ") + where);
    }
    for (int i = 0; i < count; ++i) threads[i].state = State::ready;
  }
  for (size_t i = 0; i < guard; ++i)
    if (dynamic[i] != 0xff || dynamic[dynamic.size() - 1 - i] != 0xff)
      fail("wrote outside the dynamic shared memory");
}

template <class... P>
struct Launch {
  void (*kernel)(P...);
  dim3 grid, block;
  size_t shared;

  void operator()(P... p) const {
    const uint64_t count = uint64_t{block.x} * block.y * block.z;
    const bool fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                      grid.z <= 65535 && count && count <= most_threads && shared <= most_shared;
    last_error = fits ? cudaSuccess : cudaErrorInvalidConfiguration;
    if (!fits) return;
    if (!stacks)
      stacks = static_cast<char*>(mmap(nullptr, most_threads * stack_bytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    const auto call = std::make_tuple(kernel, p...);
    arguments = &call;
    body = [](const void* with) {
      std::apply([](auto run, auto... given) { run(given...); },
                 *static_cast<const decltype(call)*>(with));
    };
    gridDim = grid, blockDim = block;
    dynamic.resize(shared + 2 * guard);
    const Faults faults;
    for (const int64_t i : sequence(0, int64_t{grid.x} * grid.y * grid.z)) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      run_block(static_cast<int>(count));
    }
  }
};

// What kernel<<<grid, block, shared, stream>>> is rewritten to.
template <class... P>
Launch<P...> configure(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared = 0,
                       cudaStream_t = nullptr) {
  return {kernel, grid, block, shared};
}

}  // namespace cuda_emulation

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

struct __half {
  timo::f16 x;
  __half() = default;
  __half(float y) : x(timo::narrow_to(y, timo::f16{})) {}
};
struct __nv_bfloat16 {
  timo::bf16 x;
  __nv_bfloat16() = default;
  __nv_bfloat16(float y) : x(timo::narrow_to(y, timo::bf16{})) {}
};
inline float __half2float(__half x) { return timo::widen(x.x); }
inline float __bfloat162float(__nv_bfloat16 x) { return timo::widen(x.x); }
