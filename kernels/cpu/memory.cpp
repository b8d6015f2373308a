// Batches over memory: picks the instruction set once, then one loop per exported function.

#include <errno.h>
#include <string.h>

#include "kvtier/bytes.h"
#include "kvtier/native.h"

namespace {

#if defined(__x86_64__)
bool supported(const KvtBytesOps* ops) {
  __builtin_cpu_init();
  if (ops == &kvt_bytes_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (ops == &kvt_bytes_avx2) return __builtin_cpu_supports("avx2");
  return true;
}
const KvtBytesOps* const kBestFirst[] = {&kvt_bytes_avx512, &kvt_bytes_avx2, &kvt_bytes_sse2};
#else
bool supported(const KvtBytesOps*) { return true; }
const KvtBytesOps* const kBestFirst[] = {&kvt_bytes_generic};
#endif

const KvtBytesOps* in_use = nullptr;

// Runs when the library is loaded, before anyone can call it.
__attribute__((constructor)) void pick() {
  for (const KvtBytesOps* ops : kBestFirst) {
    if (supported(ops)) {
      __atomic_store_n(&in_use, ops, __ATOMIC_RELEASE);
      return;
    }
  }
}

// A batch that does not fit a core's own cache cannot be found there by whoever reads it next,
// so it is written around the cache. 1 MiB: half an L2 of today, a guess.
constexpr uint64_t kStreamBatchBytes = 1024 * 1024;

bool streams(size_t n, const uint64_t len[]) {
  uint64_t total = 0;
  for (size_t i = 0; i < n; i++) total += len[i];
  return total >= kStreamBatchBytes;
}

}  // namespace

const KvtBytesOps* kvt_bytes_ops() { return __atomic_load_n(&in_use, __ATOMIC_ACQUIRE); }

uint32_t kvt_abi_version(void) { return KVT_ABI_VERSION; }

const char* kvt_isa(void) { return kvt_bytes_ops()->isa; }

int32_t kvt_select_isa(const char* name) {
  for (const KvtBytesOps* ops : kBestFirst) {
    if (strcmp(ops->isa, name) != 0) continue;
    if (!supported(ops)) return ENOTSUP;
    __atomic_store_n(&in_use, ops, __ATOMIC_RELEASE);
    return 0;
  }
  return EINVAL;
}

int32_t kvt_checksum(size_t n, const void* const src[], const uint64_t len[], uint64_t out[]) {
  const KvtBytesOps* ops = kvt_bytes_ops();
  for (size_t i = 0; i < n; i++) out[i] = ops->checksum(src[i], len[i]);
  return 0;
}

int32_t kvt_copy(size_t n, void* const dst[], const void* const src[], const uint64_t len[]) {
  const KvtBytesOps* ops = kvt_bytes_ops();
  const bool stream = streams(n, len);
  for (size_t i = 0; i < n; i++) ops->copy(dst[i], src[i], len[i], stream);
  return 0;
}

int32_t kvt_copy_checksum(size_t n, void* const dst[], const void* const src[],
                          const uint64_t len[], uint64_t out_checksum[]) {
  const KvtBytesOps* ops = kvt_bytes_ops();
  const bool stream = streams(n, len);
  for (size_t i = 0; i < n; i++) {
    out_checksum[i] = ops->copy_checksum(dst[i], src[i], len[i], stream);
  }
  return 0;
}
