// checksum, copy and copy_checksum for one instruction set. Compiled once per set, with
// -DKVT_ISA=<name> and that set's -m flags; nothing here may have external linkage except the
// table at the end, or the linker might pick the AVX-512 version of it for everybody.

#define XXH_INLINE_ALL
#include "xxhash.h"

#include <stdint.h>
#include <string.h>

#include "kvtier/bytes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// XXH3 of more than 240 bytes: 64-byte stripes, 16 of them to a block, the accumulators scrambled
// after each block; the last block is never full and the last stripe is hashed with other secret.
// The loop over blocks is ours (it copies on the way), everything inside it is xxhash's.
constexpr size_t kStripe = XXH_STRIPE_LEN;
constexpr size_t kSecret = sizeof(XXH3_kSecret);
constexpr size_t kStripesPerBlock = (kSecret - XXH_STRIPE_LEN) / XXH_SECRET_CONSUME_RATE;
constexpr size_t kBlock = kStripe * kStripesPerBlock;
static_assert(kBlock == 1024, "the default secret has 192 bytes");

// Measured on Ice Lake, 64 x 2 MiB: no prefetch 7.9 GB/s, 2 KiB ahead 9.0, 4 KiB ahead 9.4.
constexpr size_t kPrefetchAhead = 4096;
// Measured: 4 KiB 4.9, 16 KiB 5.5, 32 KiB 5.6, 128 KiB 5.6 GB/s; all of it must stay in L1 or L2.
constexpr size_t kCachedChunk = 32 * 1024;
static_assert(kCachedChunk % kBlock == 0, "chunks are whole blocks");

struct Hash {
  XXH_ALIGN(64) xxh_u64 acc[8] = XXH3_INIT_ACC;

  void block(const uint8_t* data) {
    XXH3_accumulate(acc, data, XXH3_kSecret, kStripesPerBlock);
    XXH3_scrambleAcc(acc, XXH3_kSecret + kSecret - kStripe);
  }

  // `data` is all `len` bytes, of which the first `blocks` blocks went through block().
  uint64_t finish(const uint8_t* data, size_t len, size_t blocks) {
    const size_t stripes = (len - 1 - kBlock * blocks) / kStripe;
    XXH3_accumulate(acc, data + kBlock * blocks, XXH3_kSecret, stripes);
    XXH3_accumulate_512(acc, data + len - kStripe,
                        XXH3_kSecret + kSecret - kStripe - XXH_SECRET_LASTACC_START);
    return XXH3_finalizeLong_64b(acc, XXH3_kSecret, len);
  }
};

// Stores past the cache. `dst` is 64-byte aligned, `src` need not be.
inline void stream_64(uint8_t* dst, const uint8_t* src) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
  }
#else
  memcpy(dst, src, 64);
#endif
}

// Streamed stores are not ordered with others; after this they are.
inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline bool can_stream(const uint8_t* dst) {
#if defined(__SSE2__)
  return reinterpret_cast<uintptr_t>(dst) % 64 == 0;
#else
  (void)dst;
  return false;
#endif
}

// A prefetch past the end of the source is harmless: it never faults.
inline void prefetch(const uint8_t* address) { __builtin_prefetch(address + kPrefetchAhead, 0, 3); }

uint64_t checksum(const void* src, size_t len) { return XXH3_64bits(src, len); }

void copy(void* to, const void* from, size_t len, bool stream) {
  auto* dst = static_cast<uint8_t*>(to);
  const auto* src = static_cast<const uint8_t*>(from);
  size_t done = 0;
  if (stream && can_stream(dst)) {
    for (; done + 64 <= len; done += 64) {
      prefetch(src + done);
      stream_64(dst + done, src + done);
    }
    stream_end();
  }
  if (done < len) memcpy(dst + done, src + done, len - done);
}

// Through one block of cache-resident memory of ours: filled from the source, hashed, streamed
// out. So what is hashed is what is stored, and the target is never read.
uint64_t copy_checksum_stream(uint8_t* dst, const uint8_t* src, size_t len) {
  alignas(64) uint8_t bounce[kBlock];
  Hash hash;
  const size_t blocks = (len - 1) / kBlock;
  for (size_t block = 0; block < blocks; block++) {
    const uint8_t* from = src + block * kBlock;
    uint8_t* to = dst + block * kBlock;
    // 64 bytes at a time: for the whole block at once GCC 12 emits `rep movs` here (AVX2 then did
    // 4.9 GB/s instead of 8.1).
    for (size_t i = 0; i < kBlock; i += 64) {
      prefetch(from + i);
      memcpy(bounce + i, from + i, 64);
    }
    // The compiler may not look through the copy and read the source a second time.
    __asm__ volatile("" : : "r"(bounce) : "memory");
    hash.block(bounce);
    for (size_t i = 0; i < kBlock; i += 64) stream_64(to + i, bounce + i);
  }
  stream_end();
  memcpy(dst + blocks * kBlock, src + blocks * kBlock, len - blocks * kBlock);
  __asm__ volatile("" : : "r"(dst) : "memory");
  return hash.finish(dst, len, blocks);
}

// Chunk by chunk: copied, then hashed from the target while it is in the cache.
uint64_t copy_checksum_cached(uint8_t* dst, const uint8_t* src, size_t len) {
  Hash hash;
  const size_t blocks = (len - 1) / kBlock;
  size_t hashed = 0;
  for (size_t done = 0; done < len;) {
    const size_t chunk = len - done < kCachedChunk ? len - done : kCachedChunk;
    memcpy(dst + done, src + done, chunk);
    __asm__ volatile("" : : "r"(dst) : "memory");
    done += chunk;
    for (; hashed < blocks && (hashed + 1) * kBlock <= done; hashed++) {
      hash.block(dst + hashed * kBlock);
    }
  }
  return hash.finish(dst, len, blocks);
}

uint64_t copy_checksum(void* to, const void* from, size_t len, bool stream) {
  auto* dst = static_cast<uint8_t*>(to);
  const auto* src = static_cast<const uint8_t*>(from);
  if (len <= XXH3_MIDSIZE_MAX) {
    if (len > 0) memcpy(dst, src, len);
    __asm__ volatile("" : : "r"(dst) : "memory");
    return XXH3_64bits(dst, len);
  }
  if (stream && can_stream(dst)) return copy_checksum_stream(dst, src, len);
  return copy_checksum_cached(dst, src, len);
}

}  // namespace

#define KVT_STRING2(x) #x
#define KVT_STRING(x) KVT_STRING2(x)
#define KVT_JOIN2(a, b) a##b
#define KVT_JOIN(a, b) KVT_JOIN2(a, b)

extern "C" const KvtBytesOps KVT_JOIN(kvt_bytes_, KVT_ISA);
extern "C" const KvtBytesOps KVT_JOIN(kvt_bytes_, KVT_ISA) = {
    KVT_STRING(KVT_ISA),
    checksum,
    copy,
    copy_checksum,
};
