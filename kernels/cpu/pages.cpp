// The catalogue's LMDB file, checked before LMDB maps it, and its records taken out of it on the
// way: a torn page kills a process that maps it, and a million records are slow to ask for one by
// one. As strict as py-lmdb's `lmdb.verify`, for files as kvtier writes them: format 0.9 on a 64-bit
// little-endian machine, one named database with integer keys, no duplicates. Whatever else it
// meets it calls unsound; `lmdb.verify` then says what is wrong, if anything is.

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kvtier/native.h"

namespace {

constexpr uint64_t kHeader = 16, kMetas = 2, kNone = ~uint64_t{0};
constexpr uint32_t kMagic = 0xbeefc0de, kVersion = 1, kDepthMax = 32;
constexpr uint16_t kBranch = 1, kLeaf = 2, kOverflow = 4, kMeta = 8;  // page flags
constexpr uint16_t kBigData = 1, kSubData = 2;                        // node flags
constexpr uint16_t kIntegerKey = 8;                                   // database flags

template <typename T>
T load(const uint8_t* at) {
  T value;
  memcpy(&value, at, sizeof(T));
  return value;
}

struct Database {
  explicit Database(const uint8_t* at)
      : pad(load<uint32_t>(at)),
        flags(load<uint16_t>(at + 4)),
        depth(load<uint16_t>(at + 6)),
        branches(load<uint64_t>(at + 8)),
        leaves(load<uint64_t>(at + 16)),
        overflows(load<uint64_t>(at + 24)),
        entries(load<uint64_t>(at + 32)),
        root(load<uint64_t>(at + 40)) {}

  uint32_t pad;
  uint16_t flags, depth;
  uint64_t branches, leaves, overflows, entries, root;
};
constexpr uint32_t kDatabaseBytes = 48;

enum class Kind { kFree, kMain, kSlots };

struct Tree {
  Tree(Kind kind_, const Database& db_) : kind(kind_), db(db_) {}

  Kind kind;
  Database db;
  uint64_t branches = 0, leaves = 0, overflows = 0, entries = 0;
  uint32_t depth = 0;
  const uint8_t* last_key = nullptr;
  uint32_t last_len = 0;
};

class Checker {
 public:
  explicit Checker(KvtPages* pages) : p_(pages) {}
  ~Checker() { free(seen_); }

  int32_t run(uint32_t* keys, uint32_t* lengths, uint8_t* values) {
    keys_ = keys;
    lengths_ = lengths;
    values_ = values;
    p_->entries = p_->value_bytes = 0;
    if (!read_metas()) return EILSEQ;
    seen_ = static_cast<uint8_t*>(calloc(1, next_));
    if (seen_ == nullptr) return ENOMEM;
    const Database free_db(meta_ + 24), main_db(meta_ + 24 + kDatabaseBytes);
    if (main_db.flags != 0 || main_db.pad > page_size_ - kHeader) return EILSEQ;
    if ((free_db.flags & ~kIntegerKey) != 0) return EILSEQ;
    Tree free_tree(Kind::kFree, free_db), main_tree(Kind::kMain, main_db);
    if (!check(&free_tree) || !check(&main_tree)) return EILSEQ;
    for (uint64_t page = kMetas; page < next_; page++) {
      if (seen_[page] == 0) return EILSEQ;
    }
    return 0;
  }

 private:
  const uint8_t* page(uint64_t number) const { return p_->file + number * page_size_; }
  bool in_file(uint64_t number, uint64_t count) const {
    return number < p_->size / page_size_ && count <= p_->size / page_size_ - number;
  }

  bool read_metas() {
    if (p_->size < kHeader + 136) return false;
    page_size_ = load<uint32_t>(p_->file + kHeader + 24);
    if (page_size_ < 256 || page_size_ > 0x8000 || (page_size_ & (page_size_ - 1)) != 0 ||
        !in_file(0, 2)) {
      return false;
    }
    uint64_t txnid[2];
    for (uint64_t i = 0; i < kMetas; i++) {
      const uint8_t* at = page(i);
      const uint8_t* meta = at + kHeader;
      txnid[i] = load<uint64_t>(meta + 128);
      if (load<uint64_t>(at) != i || (load<uint16_t>(at + 10) & kMeta) == 0 ||
          load<uint32_t>(meta) != kMagic || load<uint32_t>(meta + 4) != kVersion ||
          load<uint32_t>(meta + 24) != page_size_ || (txnid[i] != 0 && (txnid[i] & 1) != i)) {
        return false;
      }
    }
    meta_ = page(txnid[0] < txnid[1] ? 1 : 0) + kHeader;
    txnid_ = load<uint64_t>(meta_ + 128);
    const uint64_t last = load<uint64_t>(meta_ + 120), in_file = p_->size / page_size_;
    next_ = last + 1;
    return last >= kMetas - 1 && last < in_file + (in_file > 1 << 20 ? in_file : 1 << 20);
  }

  // Each page is part of one tree, or free, once.
  bool see(uint64_t number) {
    if (number < kMetas || number >= next_ || seen_[number] != 0) return false;
    seen_[number] = 1;
    return true;
  }

  bool check(Tree* tree) {
    const Database& db = tree->db;
    if (db.root != kNone && (db.depth > kDepthMax || !walk(tree, db.root, 1))) return false;
    return tree->branches == db.branches && tree->leaves == db.leaves &&
           tree->overflows == db.overflows && tree->entries == db.entries &&
           tree->depth == db.depth;
  }

  bool walk(Tree* tree, uint64_t number, uint32_t depth) {
    if (!see(number) || !in_file(number, 1)) return false;
    const uint8_t* at = page(number);
    const uint16_t flags = load<uint16_t>(at + 10);
    const uint64_t lower = load<uint16_t>(at + 12), upper = load<uint16_t>(at + 14);
    if (load<uint64_t>(at) != number || lower < kHeader || lower > upper || upper > page_size_) {
      return false;
    }
    const uint32_t count = static_cast<uint32_t>((lower - kHeader) / 2);
    if (depth > tree->depth) tree->depth = depth;
    if (flags == kBranch) {
      tree->branches++;
      if (count < 1 || depth >= kDepthMax) return false;
    } else if (flags == kLeaf) {
      tree->leaves++;
    } else {
      return false;
    }
    const uint8_t* before = nullptr;
    uint32_t before_len = 0;
    for (uint32_t i = 0; i < count; i++) {
      const uint64_t offset = load<uint16_t>(at + kHeader + 2 * i);
      if (offset + 8 > page_size_ || offset < upper) return false;
      const uint8_t* node = at + offset;
      const uint32_t key_len = load<uint16_t>(node + 6);
      if (offset + 8 + key_len > page_size_) return false;
      if (flags == kLeaf) {
        if (!leaf(tree, node, key_len, at)) return false;
        continue;
      }
      if (i > 0) {
        if (!in_order(tree->kind, before, before_len, node + 8, key_len)) return false;
        before = node + 8;
        before_len = key_len;
      }
      const uint64_t child = load<uint32_t>(node) | uint64_t{load<uint16_t>(node + 4)} << 32;
      if (!walk(tree, child, depth + 1)) return false;
    }
    return true;
  }

  // Whether `key` has its database's form and comes after `before` (nullptr: the first one).
  static bool in_order(Kind kind, const uint8_t* before, uint32_t before_len, const uint8_t* key,
                       uint32_t len) {
    if (kind == Kind::kSlots) {
      return len == 4 && (before == nullptr || load<uint32_t>(before) < load<uint32_t>(key));
    }
    if (kind == Kind::kFree) {
      return len == 8 && (before == nullptr || load<uint64_t>(before) < load<uint64_t>(key));
    }
    if (before == nullptr) return true;
    const int order = memcmp(before, key, before_len < len ? before_len : len);
    return order < 0 || (order == 0 && before_len < len);
  }

  bool leaf(Tree* tree, const uint8_t* node, uint32_t key_len, const uint8_t* at) {
    const uint16_t flags = load<uint16_t>(node + 4);
    const uint32_t len = load<uint32_t>(node);
    const uint8_t *key = node + 8, *value = key + key_len;
    if (!in_order(tree->kind, tree->last_key, tree->last_len, key, key_len)) return false;
    tree->last_key = key;
    tree->last_len = key_len;
    tree->entries++;
    const uint64_t room = static_cast<uint64_t>(at + page_size_ - value);
    if (tree->kind == Kind::kFree && flags == kBigData) {
      if (room < 8) return false;
      value = overflow(tree, load<uint64_t>(value), len);
      return value != nullptr && free_list(key, value, len);
    }
    if (len > room) return false;
    if (tree->kind == Kind::kFree) return flags == 0 && free_list(key, value, len);
    if (tree->kind == Kind::kSlots) return flags == 0 && record(key, value, len);
    if (flags == 0) return true;
    const bool slots = key_len == 5 && memcmp(key, "slots", 5) == 0;
    return flags == kSubData && len == kDatabaseBytes && slots && named(Database(value));
  }

  bool named(const Database& db) {
    if (db.flags != kIntegerKey || db.pad > page_size_ - kHeader) return false;
    Tree tree(Kind::kSlots, db);
    return check(&tree);
  }

  bool record(const uint8_t* key, const uint8_t* value, uint32_t len) {
    if (keys_ != nullptr) {
      keys_[p_->entries] = load<uint32_t>(key);
      lengths_[p_->entries] = len;
      memcpy(values_ + p_->value_bytes, value, len);
    }
    p_->entries++;
    p_->value_bytes += len;
    return true;
  }

  const uint8_t* overflow(Tree* tree, uint64_t first, uint32_t len) {
    const uint64_t count = (kHeader - 1 + len) / page_size_ + 1;
    if (!in_file(first, count)) return nullptr;
    for (uint64_t i = 0; i < count; i++) {
      if (!see(first + i)) return nullptr;
    }
    const uint8_t* at = page(first);
    if (load<uint64_t>(at) != first || load<uint16_t>(at + 10) != kOverflow ||
        load<uint32_t>(at + 12) != count) {
      return nullptr;
    }
    tree->overflows += count;
    return at + kHeader;
  }

  bool free_list(const uint8_t* key, const uint8_t* value, uint32_t len) {
    const uint64_t txnid = load<uint64_t>(key);
    if (txnid < 1 || txnid > txnid_ || len < 8 || len % 8 != 0) return false;
    const uint64_t count = load<uint64_t>(value);
    if (count != len / 8 - 1) return false;
    uint64_t before = kNone;
    for (uint64_t i = 1; i <= count; i++) {
      const uint64_t number = load<uint64_t>(value + 8 * i);
      if (number >= before || !see(number)) return false;
      before = number;
    }
    return true;
  }

  KvtPages* p_;
  uint64_t page_size_ = 0, next_ = 0, txnid_ = 0;
  const uint8_t* meta_ = nullptr;
  uint8_t* seen_ = nullptr;
  uint32_t *keys_ = nullptr, *lengths_ = nullptr;
  uint8_t* values_ = nullptr;
};

}  // namespace

int32_t kvt_pages_check(KvtPages* pages) { return Checker(pages).run(nullptr, nullptr, nullptr); }

int32_t kvt_pages_list(KvtPages* pages, uint32_t keys[], uint32_t lengths[], uint8_t values[]) {
  return Checker(pages).run(keys, lengths, values);
}
