// Records of the SSD tier's catalogue, found again at start: which of them count, and the chains
// that their blocks make. The Python twin is in kvtier/tiers/records.py.

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kvtier/bytes.h"
#include "kvtier/native.h"

namespace {

constexpr uint32_t kNone = 0xffffffffu;
// checksum u64, slot u32, position u32, payload checksum u64, generation u64
constexpr size_t kSlot = 8, kPosition = 12, kPayloadChecksum = 16, kGeneration = 24;
// slot_bytes u32, size u64, epoch u64, namespace 16, shard u16, codec u8, fidelity u8, key length
// u8, parent length u8, when it was stored u32; then key, parent
constexpr size_t kSlotBytes = 32, kSize = 36, kEpoch = 44, kNamespace = 52, kShard = 68;
constexpr size_t kCodec = 70, kFidelity = 71, kKeyLen = 72, kParentLen = 73, kWritten = 74;
constexpr size_t kKey = 78;

template <typename T>
T load(const uint8_t* at) {
  T value;
  memcpy(&value, at, sizeof(T));
  return value;
}

// Memory that is given back at the end. `failed`: some of it was not to be had.
class Memory {
 public:
  ~Memory() {
    for (size_t i = 0; i < count_; i++) free(taken_[i]);
  }
  template <typename T>
  T* take(uint64_t items, int fill) {
    const size_t size = (items == 0 ? 1 : items) * sizeof(T);
    void* memory = count_ == kTakenMax ? nullptr : fill == 0 ? calloc(1, size) : malloc(size);
    if (memory == nullptr) {
      failed_ = true;
      return nullptr;
    }
    if (fill != 0) memset(memory, fill, size);
    taken_[count_++] = memory;
    return static_cast<T*>(memory);
  }
  bool failed() const { return failed_; }

 private:
  static constexpr size_t kTakenMax = 16;
  void* taken_[kTakenMax] = {};
  size_t count_ = 0;
  bool failed_ = false;
};

class Arranger {
 public:
  explicit Arranger(KvtRecords* records) : r_(records) {}

  int32_t run() {
    for (uint64_t p = 0; p < r_->pieces; p++) total_ += r_->piece_count[p];
    if (total_ >= kNone) return ENOMEM;
    uint64_t capacity = 16;
    while (capacity < total_ * 2) capacity *= 2;
    mask_ = capacity - 1;
    value_ = memory_.take<const uint8_t*>(total_, 0);
    space_ = memory_.take<uint32_t>(total_, 0);
    next_ = memory_.take<uint32_t>(total_, 0xff);
    table_ = memory_.take<uint32_t>(capacity, 0xff);
    first_ = memory_.take<uint32_t>(total_, 0);
    shards_ = memory_.take<uint32_t>(total_, 0);
    placed_ = memory_.take<uint8_t>(total_, 0);
    child_ = memory_.take<uint32_t>(total_, 0xff);
    last_child_ = memory_.take<uint32_t>(total_, 0xff);
    sibling_ = memory_.take<uint32_t>(total_, 0xff);
    stack_ = memory_.take<uint32_t>(total_, 0);
    starts_ = memory_.take<uint32_t>(total_, 0);
    lengths_ = memory_.take<uint64_t>(r_->spaces * (KVT_KEY_BYTES_MAX + 1), 0);
    if (memory_.failed()) return ENOMEM;
    r_->stretch_count = r_->block_count = r_->generation_max = 0;
    judge();
    choose_key_sizes();
    keep_newest();
    drop_torn();
    link();
    place();
    return 0;
  }

 private:
  const uint8_t* key(uint32_t record) const { return value_[record] + kKey; }
  uint32_t key_len(uint32_t record) const { return value_[record][kKeyLen]; }
  uint64_t generation(uint32_t record) const { return load<uint64_t>(value_[record] + kGeneration); }
  uint32_t shard(uint32_t record) const { return load<uint16_t>(value_[record] + kShard); }
  void drop(uint32_t record) { r_->verdict[record] = KVT_RECORD_STALE; }

  // Each record by itself.
  void judge() {
    const KvtBytesOps* ops = kvt_bytes_ops();
    uint32_t n = 0;
    for (uint64_t p = 0; p < r_->pieces; p++) {
      const uint8_t* value = r_->value[p];
      for (uint64_t i = 0; i < r_->piece_count[p]; i++, n++) {
        const uint32_t len = r_->value_len[p][i];
        value_[n] = value;
        r_->verdict[n] = judge_one(ops, value, len, r_->stored_key[p][i], n);
        value += len;
      }
    }
  }

  uint8_t judge_one(const KvtBytesOps* ops, const uint8_t* v, uint32_t len, uint32_t stored_key,
                    uint32_t n) {
    if (len < kKey || load<uint32_t>(v + kSlot) != stored_key ||
        ops->checksum(v + 8, len - 8) != load<uint64_t>(v)) {
      return KVT_RECORD_DAMAGED;
    }
    const uint64_t generation = load<uint64_t>(v + kGeneration);
    if (generation > r_->generation_max) r_->generation_max = generation;
    const uint32_t key_size = v[kKeyLen], parent_size = v[kParentLen];
    if (key_size == 0 || key_size > KVT_KEY_BYTES_MAX || parent_size > KVT_KEY_BYTES_MAX ||
        kKey + key_size + parent_size != len) {
      return KVT_RECORD_DROPPED;
    }
    const uint64_t segment = stored_key >> r_->slot_bits;
    const uint64_t index = stored_key & ((uint64_t{1} << r_->slot_bits) - 1);
    const uint64_t slot_bytes = load<uint32_t>(v + kSlotBytes);
    const uint32_t space = find_space(v + kNamespace);
    if (segment >= r_->segments || slot_bytes != r_->slot_bytes[segment] ||
        generation < r_->generation_min[segment] || index >= r_->slot_count[segment] ||
        space == kNone || load<uint64_t>(v + kEpoch) != r_->epoch[space] ||
        !fits(slot_bytes, r_->space_slot_bytes[space]) ||
        !fits(load<uint64_t>(v + kSize), r_->space_size[space]) ||
        load<uint16_t>(v + kShard) >= r_->space_shards[space] || v[kCodec] >= 64 ||
        v[kFidelity] >= 64 || !(r_->codecs >> v[kCodec] & 1) ||
        !(r_->fidelities >> v[kFidelity] & 1)) {
      return KVT_RECORD_DROPPED;
    }
    space_[n] = space;
    lengths_[uint64_t{space} * (KVT_KEY_BYTES_MAX + 1) + key_size]++;
    return KVT_RECORD_KEPT;
  }

  static bool fits(uint64_t size, uint64_t wanted) { return wanted == 0 || size == wanted; }

  uint32_t find_space(const uint8_t* digest) {
    if (last_space_ != kNone && memcmp(r_->digest + 16 * last_space_, digest, 16) == 0) {
      return last_space_;
    }
    uint64_t low = 0, high = r_->spaces;
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      const int order = memcmp(r_->digest + 16 * middle, digest, 16);
      if (order == 0) return last_space_ = static_cast<uint32_t>(middle);
      if (order < 0) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return kNone;
  }

  // One damaged record must not speak for all others: the most common length, the least of equals.
  void choose_key_sizes() {
    for (uint64_t space = 0; space < r_->spaces; space++) {
      const uint64_t* counts = lengths_ + space * (KVT_KEY_BYTES_MAX + 1);
      uint64_t best = 0;
      for (uint64_t size = 1; size <= KVT_KEY_BYTES_MAX; size++) {
        if (counts[size] > counts[best]) best = size;
      }
      r_->key_size[space] = best;
    }
  }

  uint64_t home(const uint8_t* bytes, uint32_t size, uint32_t space) const {
    return (kvt_bytes_ops()->checksum(bytes, size) + space * 0x9e3779b97f4a7c15u) & mask_;
  }

  // The place in the table of the block with this key: its number is there, or kNone.
  uint32_t* find(const uint8_t* bytes, uint32_t size, uint32_t space) {
    for (uint64_t at = home(bytes, size, space);; at = (at + 1) & mask_) {
      const uint32_t block = table_[at];
      if (block == kNone) return table_ + at;
      const uint32_t record = first_[block];
      if (space_[record] == space && key_len(record) == size &&
          memcmp(key(record), bytes, size) == 0) {
        return table_ + at;
      }
    }
  }

  // Blocks are numbered in the order of their first records; a block's records are a list.
  void keep_newest() {
    for (uint32_t n = 0; n < total_; n++) {
      if (r_->verdict[n] != KVT_RECORD_KEPT) continue;
      if (key_len(n) != r_->key_size[space_[n]]) {
        drop(n);
        continue;
      }
      uint32_t* place = find(key(n), key_len(n), space_[n]);
      if (*place == kNone) {
        first_[blocks_] = n;
        shards_[blocks_] = 1;
        *place = blocks_++;
      } else {
        add(*place, n);
      }
    }
  }

  void add(uint32_t block, uint32_t n) {
    uint32_t* link = &first_[block];
    while (*link != kNone && shard(*link) != shard(n)) link = &next_[*link];
    if (*link == kNone) {
      *link = n;
      shards_[block]++;
    } else if (generation(n) > generation(*link)) {
      drop(*link);
      next_[n] = next_[*link];
      *link = n;
    } else {
      drop(n);
    }
  }

  bool whole(uint32_t block) const { return shards_[block] != 0; }

  void drop_block(uint32_t block) {
    for (uint32_t n = first_[block]; n != kNone; n = next_[n]) drop(n);
    shards_[block] = 0;
  }

  void drop_torn() {
    for (uint32_t block = 0; block < blocks_; block++) {
      if (shards_[block] < r_->space_shards[space_[first_[block]]]) drop_block(block);
    }
  }

  // The record that speaks for the block's place in its chain: that of shard 0.
  uint32_t speaker(uint32_t block) const {
    uint32_t n = first_[block];
    while (shard(n) != 0) n = next_[n];
    return n;
  }

  void link() {
    for (uint32_t block = 0; block < blocks_; block++) {
      if (!whole(block)) continue;
      const uint32_t n = speaker(block);
      const uint8_t* parent = key(n) + key_len(n);
      const uint32_t size = value_[n][kParentLen];
      const uint32_t above = size == 0 ? kNone : *find(parent, size, space_[n]);
      if (above == kNone || !whole(above)) {
        starts_[start_count_++] = block;
        continue;
      }
      if (child_[above] == kNone) {
        child_[above] = block;
      } else {
        sibling_[last_child_[above]] = block;
      }
      last_child_[above] = block;
    }
  }

  // Chains written later come later: whoever orders blocks by age keeps the younger ones longer.
  void sort_starts() {
    uint32_t* from = starts_;
    uint32_t* to = stack_;
    for (uint64_t width = 1; width < start_count_; width *= 2) {
      for (uint64_t low = 0; low < start_count_; low += 2 * width) {
        uint64_t a = low, b = low + width;
        const uint64_t a_end = b < start_count_ ? b : start_count_;
        const uint64_t b_end = b + width < start_count_ ? b + width : start_count_;
        for (uint64_t out = low; out < b_end; out++) {
          const bool left =
              a < a_end && (b >= b_end || generation(speaker(from[a])) <= generation(speaker(from[b])));
          to[out] = left ? from[a++] : from[b++];
        }
      }
      uint32_t* spare = from;
      from = to;
      to = spare;
    }
    starts_ = from;
    stack_ = to;
  }

  void place() {
    sort_starts();
    for (uint64_t s = 0; s < start_count_; s++) {
      uint64_t depth = 0;
      stack_[depth++] = starts_[s];
      while (depth > 0) {
        depth--;
        depth = place_stretch(stack_[depth], depth);
      }
    }
    // Whatever was not reached has parents that run in a circle.
    for (uint32_t block = 0; block < blocks_; block++) {
      if (whole(block) && !placed_[block]) drop_block(block);
    }
  }

  // Writes the stretch from `block` on; what hangs on its end goes on the stack. Returns its depth.
  uint64_t place_stretch(uint32_t block, uint64_t depth) {
    KvtStretch* out = r_->stretches + r_->stretch_count++;
    const uint32_t n = speaker(block);
    out->space = space_[n];
    out->blocks = 0;
    out->position = load<uint32_t>(value_[n] + kPosition);
    out->parent_len = value_[n][kParentLen];
    memset(out->parent, 0, sizeof(out->parent));
    memcpy(out->parent, key(n) + key_len(n), out->parent_len);
    for (;;) {
      emit(block);
      out->blocks++;
      const uint32_t child = child_[block];
      if (child == kNone) return depth;
      if (sibling_[child] == kNone && out->blocks < KVT_STRETCH_BLOCKS_MAX) {
        block = child;
        continue;
      }
      const uint64_t before = depth;
      for (uint32_t c = child; c != kNone; c = sibling_[c]) stack_[depth++] = c;
      // The first child is to be taken first.
      for (uint64_t a = before, b = depth - 1; a < b; a++, b--) {
        const uint32_t spare = stack_[a];
        stack_[a] = stack_[b];
        stack_[b] = spare;
      }
      return depth;
    }
  }

  void emit(uint32_t block) {
    const uint32_t any = first_[block], size = key_len(any);
    const uint64_t shards = r_->space_shards[space_[any]];
    memcpy(r_->keys + key_bytes_, key(any), size);
    key_bytes_ += size;
    uint32_t* const written = r_->written + r_->block_count;
    *written = load<uint32_t>(value_[any] + kWritten);
    for (uint32_t n = any; n != kNone; n = next_[n]) {
      const uint32_t then = load<uint32_t>(value_[n] + kWritten);
      if (then < *written) *written = then;
      const uint64_t at = slots_out_ + shard(n);
      r_->slots[at] = load<uint32_t>(value_[n] + kSlot);
      r_->checksums[at] = load<uint64_t>(value_[n] + kPayloadChecksum);
    }
    slots_out_ += shards;
    r_->block_count++;
    placed_[block] = 1;
  }

  KvtRecords* r_;
  Memory memory_;
  uint64_t total_ = 0, mask_ = 0, start_count_ = 0, key_bytes_ = 0, slots_out_ = 0;
  uint32_t blocks_ = 0, last_space_ = kNone;
  // By record.
  const uint8_t** value_ = nullptr;
  uint32_t *space_ = nullptr, *next_ = nullptr;
  // By block; table_ finds a block by its key.
  uint32_t *table_ = nullptr, *first_ = nullptr, *shards_ = nullptr;
  uint32_t *child_ = nullptr, *last_child_ = nullptr, *sibling_ = nullptr;
  uint32_t *stack_ = nullptr, *starts_ = nullptr;
  uint8_t* placed_ = nullptr;
  uint64_t* lengths_ = nullptr;  // by namespace and key length
};

}  // namespace

int32_t kvt_records_arrange(KvtRecords* records) { return Arranger(records).run(); }
