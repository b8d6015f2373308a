// The inner loops that exist once per instruction set, and the one in use.
#ifndef KVTIER_BYTES_H
#define KVTIER_BYTES_H

#include <stddef.h>
#include <stdint.h>

// One item each. `stream` writes around the cache (non-temporal stores): right for batches larger
// than the cache, where it saves reading the target before overwriting it.
struct KvtBytesOps {
  const char* isa;
  uint64_t (*checksum)(const void* src, size_t len);
  void (*copy)(void* dst, const void* src, size_t len, bool stream);
  uint64_t (*copy_checksum)(void* dst, const void* src, size_t len, bool stream);
};

#if defined(__x86_64__)
extern "C" const KvtBytesOps kvt_bytes_sse2;
extern "C" const KvtBytesOps kvt_bytes_avx2;
extern "C" const KvtBytesOps kvt_bytes_avx512;
#else
extern "C" const KvtBytesOps kvt_bytes_generic;
#endif

// What this CPU does best, unless kvt_select_isa chose otherwise.
const KvtBytesOps* kvt_bytes_ops();

#endif  // KVTIER_BYTES_H
