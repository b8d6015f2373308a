// The C ABI of kvtier/_native_cpu.so. Called by kvtier/native.py through ctypes, without the GIL.
//
// Rules of every function here: takes a batch; keeps no state and takes no lock (any thread, any
// number at once); throws nothing. Sizes and offsets are bytes. Memory named by a caller stays
// the caller's and must be mapped.
#ifndef KVTIER_NATIVE_H
#define KVTIER_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define KVT_ABI_VERSION 4
#define KVT_HEADER_BYTES 4096
#define KVT_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// KVT_ABI_VERSION of this library. A caller that expects another one must not call anything else.
KVT_EXPORT uint32_t kvt_abi_version(void);

// The instruction set in use: "avx512", "avx2", "sse2" or "generic". Static storage.
KVT_EXPORT const char* kvt_isa(void);

// Uses another instruction set from now on (tests, comparisons). Results are the same in all.
// Returns 0, EINVAL (no such name in this build) or ENOTSUP (this CPU lacks it); then no change.
KVT_EXPORT int32_t kvt_select_isa(const char* name);

// out[i] = XXH3-64 (seed 0) of len[i] bytes at src[i]. Returns 0.
KVT_EXPORT int32_t kvt_checksum(size_t n, const void* const src[], const uint64_t len[],
                                uint64_t out[]);

// Copies len[i] bytes from src[i] to dst[i]. Areas must not overlap. Returns 0.
KVT_EXPORT int32_t kvt_copy(size_t n, void* const dst[], const void* const src[],
                            const uint64_t len[]);

// kvt_copy and kvt_checksum in one pass. Each source byte is read once; out_checksum[i] is of the
// bytes that were stored at dst[i], also when someone changes src[i] meanwhile. Returns 0.
KVT_EXPORT int32_t kvt_copy_checksum(size_t n, void* const dst[], const void* const src[],
                                     const uint64_t len[], uint64_t out_checksum[]);

// Writes KVT_HEADER_BYTES from header[i], then payload_len[i] bytes from payload[i], to fd[i] at
// offset[i]. err[i] = 0 when all of it was written, else errno (EIO when a write makes no
// progress); a failed item may be partly written, the others are not affected. Up to `depth` items
// (64 at most) are under way at once, in any order, on threads that end before this returns.
// Alignment for O_DIRECT is the caller's. Returns the number of failed items.
KVT_EXPORT int32_t kvt_slots_write(size_t n, uint32_t depth, const int32_t fd[],
                                   const uint64_t offset[], const void* const header[],
                                   const void* const payload[], const uint64_t payload_len[],
                                   int32_t err[]);

// Reads KVT_HEADER_BYTES to header_out[i], then payload_len[i] bytes to payload_out[i], from fd[i]
// at offset[i]; checksum_out[i] = XXH3-64 of the first size[i] payload bytes. err[i] = 0, else
// errno: EIO when the file ends before the slot does, EINVAL when size[i] > payload_len[i] (then
// nothing was read). With err[i] != 0, checksum_out[i] is 0. `depth` as for writing. Returns the
// number of failed items.
KVT_EXPORT int32_t kvt_slots_read(size_t n, uint32_t depth, const int32_t fd[],
                                  const uint64_t offset[], void* const header_out[],
                                  void* const payload_out[], const uint64_t payload_len[],
                                  const uint64_t size[], uint64_t checksum_out[], int32_t err[]);

// Gives every page that touches [ptr, ptr + len) its memory now, contents kept. Returns 0 or
// errno, also in *err: ENOMEM (not mapped, or no memory), EFAULT (a later write there would have
// been a SIGBUS: tmpfs full, huge page pool empty, file too short; or not writable). Raises no
// signal. Some pages may have been populated when it fails.
KVT_EXPORT int32_t kvt_prefault(void* ptr, uint64_t len, int32_t* err);

// --- the end of this process

#define KVT_SIGNAL_BYTES 16

// From now on a SIGBUS, SIGSEGV or SIGABRT first writes KVT_SIGNAL_BYTES to fd at offset: its number
// u32, all bits of that inverted, seconds since 1970 u64; then it does what it did before. Returns 0
// or errno. The exception to the rules above: one place for the whole process; call it from one
// thread, and not while another thread may die of such a signal.
KVT_EXPORT int32_t kvt_signals_record(int32_t fd, uint64_t offset);

// Ends that. Signals do what they did before, unless someone else has taken them over since.
KVT_EXPORT void kvt_signals_leave(void);

// --- the catalogue's file and its records (kvtier/tiers/catalogue.py describes their bytes)

// What is wrong with a data file (kvt_pages.problem), at page kvt_pages.page.
#define KVT_PAGES_SHORT 1     // the file ends before it
#define KVT_PAGES_META 2      // no meta page of ours, or not of its turn
#define KVT_PAGES_LAST 3      // the last page's number is beyond belief
#define KVT_PAGES_DATABASE 4  // the record of a database there: flags, depth
#define KVT_PAGES_RANGE 5     // names a page that there cannot be
#define KVT_PAGES_TWICE 6     // used, or free, more than once
#define KVT_PAGES_HEADER 7    // its number, type or bounds
#define KVT_PAGES_NODES 8     // nodes do not lie in it one after another
#define KVT_PAGES_KEYS 9      // a key's form, order, or place among the separators above
#define KVT_PAGES_VALUE 10    // a value of a kind that is not written there
#define KVT_PAGES_FREE 11     // a list of free pages
#define KVT_PAGES_RECORD 12   // a record's checksum
#define KVT_PAGES_COUNTS 13   // a database there has other counts than its record says
#define KVT_PAGES_LEAKED 14   // neither used nor free

// An LMDB data file, whole in memory; the rest is filled in: entries and value_bytes of its database
// "slots", or the first problem.
struct KvtPages {
  const uint8_t* file;
  uint64_t size;
  uint64_t entries;
  uint64_t value_bytes;
  uint64_t problem;
  uint64_t page;
};

// Returns 0 when LMDB can map, read and write the file without harm and every record has its
// checksum (an empty file: a new one), EILSEQ when not, ENOMEM.
KVT_EXPORT int32_t kvt_pages_check(struct KvtPages* pages);

// After kvt_pages_check, with the same bytes: gives all keys (u32) and values of "slots" in order,
// into memory for `entries` keys, as many lengths, and `value_bytes` bytes.
KVT_EXPORT int32_t kvt_pages_list(struct KvtPages* pages, uint32_t keys[], uint32_t lengths[],
                                  uint8_t values[]);

#define KVT_KEY_BYTES_MAX 64
#define KVT_STRETCH_BLOCKS_MAX 512

// What became of a record (kvt_records.verdict).
#define KVT_RECORD_KEPT 0
#define KVT_RECORD_DAMAGED 1  // its checksum is wrong, or it lies under another key
#define KVT_RECORD_DROPPED 2  // sound, but of another epoch, cut or shape
#define KVT_RECORD_STALE 3    // could count, if others were not newer or missing

// An unbranched stretch of a chain: `blocks` blocks of namespace `space`, parent before child, at
// most KVT_STRETCH_BLOCKS_MAX. `parent` is that of the first one.
struct KvtStretch {
  uint32_t space;
  uint32_t blocks;
  uint32_t position;
  uint32_t parent_len;
  uint8_t parent[KVT_KEY_BYTES_MAX];
};

// Input: records in pieces. piece p has piece_count[p] records; stored_key[p] and value_len[p] are
// arrays of u32, value[p] the values one after another. Segments and namespaces as arrays;
// digests (16 bytes each) ascending; space_slot_bytes and space_size 0 = any. codecs and fidelities: bit c set = c is known.
// Output memory is the caller's, each of `total` (the sum of piece_count) items; keys of total *
// KVT_KEY_BYTES_MAX bytes, slots and checksums in the order of keys, shards together.
struct KvtRecords {
  uint64_t pieces;
  const uint64_t* piece_count;
  const uint32_t* const* stored_key;
  const uint32_t* const* value_len;
  const uint8_t* const* value;
  uint64_t segments;
  const uint64_t* slot_bytes;
  const uint64_t* generation_min;
  const uint64_t* slot_count;
  uint64_t spaces;
  const uint8_t* digest;
  const uint64_t* epoch;
  const uint64_t* space_slot_bytes;
  const uint64_t* space_size;
  const uint64_t* space_shards;
  uint64_t slot_bits;
  uint64_t codecs;
  uint64_t fidelities;
  // out
  uint8_t* verdict;
  uint8_t* keys;
  uint32_t* slots;
  uint64_t* checksums;
  uint32_t* written;  // of each block, of its shards the earliest
  struct KvtStretch* stretches;
  uint64_t* key_size;  // of each namespace; 0 = nothing was kept
  uint64_t stretch_count;
  uint64_t block_count;
  uint64_t generation_max;  // of all sound records
};

// Decides which records count (checksum, cut, epoch, newest of each block and shard, all shards
// there, no circle of parents) and lays their blocks out as stretches, chains in the order in which
// they were written. Returns 0, or ENOMEM.
KVT_EXPORT int32_t kvt_records_arrange(struct KvtRecords* records);

#ifdef __cplusplus
}
#endif

#endif  // KVTIER_NATIVE_H
