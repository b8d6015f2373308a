// The catalogue's LMDB file, checked before LMDB maps it, and its records taken out of it on the
// way: a torn page kills a process that maps it, and a million records are slow to ask for one by
// one.
//
// What passes here, LMDB neither asserts on, nor reads beyond, nor calls corrupt, whatever is then
// read, put and deleted. That is more than any one transaction of LMDB looks at: every page of the
// newest meta page's trees has its own number, type and depth; its nodes fill it without a gap or
// overlap; keys have their form, order, and place between the separators above; each page is in one
// tree or in the free list, once; the counters are what was found; and every record has the
// checksum that it was written with.
//
// Files as kvtier writes them: format 0.9, 64 bits, little-endian, "slots" with 4-byte integer keys,
// no duplicates. kvtier/tiers/page_checks.py is the same in Python, step by step, with the same answers.

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kvtier/bytes.h"
#include "kvtier/native.h"

namespace {

constexpr uint64_t kHeader = 16, kMetas = 2, kNone = ~uint64_t{0};
constexpr uint64_t kMetaBytes = kHeader + 136, kPageMin = 512, kPageMax = 0x8000;
constexpr uint64_t kSlackPages = 1 << 20;  // free pages at the end may never have been written
constexpr uint32_t kMagic = 0xbeefc0de, kVersion = 1, kDepthMax = 32;
constexpr uint16_t kBranch = 1, kLeaf = 2, kOverflow = 4, kMeta = 8;  // page flags
constexpr uint16_t kBigData = 1, kSubData = 2;                        // node flags
constexpr uint16_t kIntegerKey = 8;                                   // database flags
constexpr uint32_t kKeyBytesMax = 511, kDatabaseBytes = 48;
constexpr uint32_t kRecordBytesMin = 12;  // checksum, slot

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

enum class Kind { kFree, kMain, kSlots, kOther };

struct Tree {
  Tree(Kind kind_, const Database& db_) : kind(kind_), db(db_) {}

  Kind kind;
  Database db;
  uint64_t branches = 0, leaves = 0, overflows = 0, entries = 0;
};

struct Key {
  const uint8_t* at = nullptr;  // nullptr: no bound
  uint32_t len = 0;
};

class Checker {
 public:
  explicit Checker(KvtPages* pages) : p_(pages) {}
  ~Checker() { free(seen_); }

  int32_t run(uint32_t* keys, uint32_t* lengths, uint8_t* values) {
    keys_ = keys;
    lengths_ = lengths;
    values_ = values;
    p_->entries = p_->value_bytes = p_->problem = p_->page = 0;
    if (p_->size == 0) return 0;  // LMDB starts a new one
    if (!read_metas()) return EILSEQ;
    seen_ = static_cast<uint8_t*>(calloc(1, next_));
    if (seen_ == nullptr) return ENOMEM;
    const Database free_db(meta_ + 24), main_db(meta_ + 24 + kDatabaseBytes);
    const uint64_t chosen = (meta_ - p_->file) / page_size_;
    if (free_db.flags != kIntegerKey || main_db.flags != 0 || main_db.pad != 0) {
      fail(KVT_PAGES_DATABASE, chosen);
      return EILSEQ;
    }
    if (!check(Kind::kFree, free_db, chosen) || !check(Kind::kMain, main_db, chosen)) {
      return EILSEQ;
    }
    for (uint64_t page = kMetas; page < next_; page++) {
      if (seen_[page] != 0) continue;
      fail(KVT_PAGES_LEAKED, page);
      return EILSEQ;
    }
    return 0;
  }

 private:
  bool fail(uint64_t problem, uint64_t page) {
    p_->problem = problem;
    p_->page = page;
    return false;
  }

  const uint8_t* page(uint64_t number) const { return p_->file + number * page_size_; }
  bool in_file(uint64_t number, uint64_t count) const {
    return number < pages_ && count <= pages_ - number;
  }

  bool read_metas() {
    if (p_->size < kMetaBytes) return fail(KVT_PAGES_SHORT, 0);
    page_size_ = load<uint32_t>(p_->file + kHeader + 24);
    if (page_size_ < kPageMin || page_size_ > kPageMax || (page_size_ & (page_size_ - 1)) != 0) {
      return fail(KVT_PAGES_META, 0);
    }
    pages_ = p_->size / page_size_;
    if (!in_file(0, kMetas)) return fail(KVT_PAGES_SHORT, 1);
    node_bytes_max_ = (((page_size_ - kHeader) / 2) & ~uint64_t{1}) - 2;
    uint64_t txnid[kMetas];
    for (uint64_t i = 0; i < kMetas; i++) {
      const uint8_t* at = page(i);
      const uint8_t* meta = at + kHeader;
      txnid[i] = load<uint64_t>(meta + 128);
      if (load<uint64_t>(at) != i || load<uint16_t>(at + 10) != kMeta ||
          load<uint32_t>(meta) != kMagic || load<uint32_t>(meta + 4) != kVersion ||
          load<uint32_t>(meta + 24) != page_size_) {
        return fail(KVT_PAGES_META, i);
      }
    }
    // Transaction n writes page n % 2; the other one is of the transaction before.
    const uint64_t lead = txnid[0] < txnid[1] ? txnid[1] - txnid[0] : txnid[0] - txnid[1];
    const bool fresh = txnid[0] == 0 && txnid[1] == 0;
    if (!fresh && (lead != 1 || txnid[0] % 2 != 0)) return fail(KVT_PAGES_META, txnid[0] < txnid[1] ? 1 : 0);
    const uint64_t chosen = txnid[0] < txnid[1] ? 1 : 0;
    meta_ = page(chosen) + kHeader;
    txnid_ = txnid[chosen];
    const uint64_t last = load<uint64_t>(meta_ + 120);
    next_ = last + 1;
    const uint64_t slack = pages_ > kSlackPages ? pages_ : kSlackPages;
    if (last < kMetas - 1 || last >= pages_ + slack) return fail(KVT_PAGES_LAST, chosen);
    return true;
  }

  // Each page is part of one tree, or free, once.
  bool see(uint64_t number, uint64_t from) {
    if (number < kMetas || number >= next_) return fail(KVT_PAGES_RANGE, from);
    if (seen_[number] != 0) return fail(KVT_PAGES_TWICE, number);
    seen_[number] = 1;
    return true;
  }

  bool check(Kind kind, const Database& db, uint64_t from) {
    Tree tree(kind, db);
    if (db.root != kNone) {
      if (db.depth < 1 || db.depth > kDepthMax) return fail(KVT_PAGES_DATABASE, from);
      if (!walk(&tree, db.root, 1, from, Key(), Key())) return false;
    } else if (db.depth != 0) {
      return fail(KVT_PAGES_DATABASE, from);
    }
    if (tree.branches != db.branches || tree.leaves != db.leaves ||
        tree.overflows != db.overflows || tree.entries != db.entries) {
      return fail(KVT_PAGES_COUNTS, from);
    }
    return true;
  }

  // One page and all below it; their keys are in [low, high).
  bool walk(Tree* tree, uint64_t number, uint32_t depth, uint64_t from, Key low, Key high) {
    if (!see(number, from)) return false;
    if (!in_file(number, 1)) return fail(KVT_PAGES_SHORT, number);
    const uint8_t* at = page(number);
    const bool leaf = depth == tree->db.depth;
    const uint64_t lower = load<uint16_t>(at + 12), upper = load<uint16_t>(at + 14);
    if (load<uint64_t>(at) != number || load<uint16_t>(at + 10) != (leaf ? kLeaf : kBranch) ||
        lower < kHeader || lower % 2 != 0 || lower > upper || upper > page_size_) {
      return fail(KVT_PAGES_HEADER, number);
    }
    const uint32_t count = static_cast<uint32_t>((lower - kHeader) / 2);
    if (count < (leaf ? 1u : 2u)) return fail(KVT_PAGES_HEADER, number);
    if (!nodes_fill(at, count, leaf, upper)) return fail(KVT_PAGES_NODES, number);
    (leaf ? tree->leaves : tree->branches)++;
    // Keys first: then what is below may be compared with them.
    Key before = low;
    bool strict = !leaf;
    for (uint32_t i = leaf ? 0 : 1; i < count; i++) {
      const Key key = key_of(at, i);
      if (!has_form(tree->kind, key)) return fail(KVT_PAGES_KEYS, number);
      if (before.at != nullptr) {
        const int order = compare(tree->kind, before, key);
        if (order > 0 || (order == 0 && strict)) return fail(KVT_PAGES_KEYS, number);
      }
      before = key;
      strict = true;
    }
    if (high.at != nullptr && compare(tree->kind, before, high) >= 0) {
      return fail(KVT_PAGES_KEYS, number);
    }
    for (uint32_t i = 0; i < count; i++) {
      const uint8_t* node = node_of(at, i);
      if (leaf) {
        if (!value(tree, node, number)) return false;
        continue;
      }
      const uint64_t child = load<uint32_t>(node) | uint64_t{load<uint16_t>(node + 4)} << 32;
      const Key next = i + 1 < count ? key_of(at, i + 1) : high;
      if (!walk(tree, child, depth + 1, number, i == 0 ? low : key_of(at, i), next)) return false;
    }
    return true;
  }

  static const uint8_t* node_of(const uint8_t* at, uint32_t i) {
    return at + load<uint16_t>(at + kHeader + 2 * i);
  }

  static Key key_of(const uint8_t* at, uint32_t i) {
    const uint8_t* node = node_of(at, i);
    Key key;
    key.at = node + 8;
    key.len = load<uint16_t>(node + 6);
    return key;
  }

  // Nodes lie in [upper, page end) one after another: none is cut off, shared or missing.
  bool nodes_fill(const uint8_t* at, uint32_t count, bool leaf, uint64_t upper) {
    if (upper % 2 != 0) return false;
    for (uint32_t i = 0; i < count; i++) {
      const uint64_t offset = load<uint16_t>(at + kHeader + 2 * i);
      if (offset < upper || offset % 2 != 0 || offset + 8 > page_size_) return false;
      const uint8_t* node = at + offset;
      uint64_t bytes = 8 + uint64_t{load<uint16_t>(node + 6)};
      if (leaf) {
        const bool big = (load<uint16_t>(node + 4) & kBigData) != 0;
        bytes += big ? 8 : load<uint32_t>(node);
        if (bytes > (big ? page_size_ : node_bytes_max_)) return false;
      }
      bytes = (bytes + 1) & ~uint64_t{1};
      if (offset + bytes > page_size_) return false;
      node_bytes_[offset / 2] = static_cast<uint16_t>(bytes);
    }
    uint32_t found = 0;
    uint64_t offset = upper;
    while (offset < page_size_) {
      const uint16_t bytes = node_bytes_[offset / 2];
      if (bytes == 0) return false;
      node_bytes_[offset / 2] = 0;
      offset += bytes;
      found++;
    }
    return offset == page_size_ && found == count;
  }

  static bool has_form(Kind kind, Key key) {
    if (kind == Kind::kSlots) return key.len == 4;
    if (kind == Kind::kFree) return key.len == 8;
    return key.len >= 1 && key.len <= kKeyBytesMax;
  }

  static int compare(Kind kind, Key one, Key two) {
    if (kind == Kind::kSlots) {
      const uint32_t a = load<uint32_t>(one.at), b = load<uint32_t>(two.at);
      return a < b ? -1 : a > b;
    }
    if (kind == Kind::kFree) {
      const uint64_t a = load<uint64_t>(one.at), b = load<uint64_t>(two.at);
      return a < b ? -1 : a > b;
    }
    const int order = memcmp(one.at, two.at, one.len < two.len ? one.len : two.len);
    return order != 0 ? order : one.len < two.len ? -1 : one.len > two.len;
  }

  bool value(Tree* tree, const uint8_t* node, uint64_t number) {
    const uint16_t flags = load<uint16_t>(node + 4);
    const uint32_t len = load<uint32_t>(node), key_len = load<uint16_t>(node + 6);
    const uint8_t *key = node + 8, *at = key + key_len;
    tree->entries++;
    switch (tree->kind) {
      case Kind::kFree:
        if (flags == kBigData) at = overflow(tree, load<uint64_t>(at), len, number);
        if (at == nullptr) return false;
        if (flags != 0 && flags != kBigData) return fail(KVT_PAGES_VALUE, number);
        return free_list(key, at, len, number);
      case Kind::kSlots:
        if (flags != 0) return fail(KVT_PAGES_VALUE, number);
        return record(key, at, len, number);
      case Kind::kMain:
        if (flags == kSubData && len == kDatabaseBytes) {
          return named(key_len == 5 && memcmp(key, "slots", 5) == 0, Database(at), number);
        }
        break;
      case Kind::kOther:
        break;
    }
    return flags == 0 || fail(KVT_PAGES_VALUE, number);
  }

  bool named(bool slots, const Database& db, uint64_t number) {
    if (db.flags != (slots ? kIntegerKey : 0) || db.pad != 0) {
      return fail(KVT_PAGES_DATABASE, number);
    }
    return check(slots ? Kind::kSlots : Kind::kOther, db, number);
  }

  bool record(const uint8_t* key, const uint8_t* at, uint32_t len, uint64_t number) {
    if (keys_ != nullptr) {
      keys_[p_->entries] = load<uint32_t>(key);
      lengths_[p_->entries] = len;
      memcpy(values_ + p_->value_bytes, at, len);
    } else if (len < kRecordBytesMin || load<uint32_t>(at + 8) != load<uint32_t>(key) ||
               load<uint64_t>(at) != kvt_bytes_ops()->checksum(at + 8, len - 8)) {
      return fail(KVT_PAGES_RECORD, number);
    }
    p_->entries++;
    p_->value_bytes += len;
    return true;
  }

  const uint8_t* overflow(Tree* tree, uint64_t first, uint32_t len, uint64_t from) {
    if (!see(first, from)) return nullptr;
    if (!in_file(first, 1)) {
      fail(KVT_PAGES_SHORT, first);
      return nullptr;
    }
    const uint8_t* at = page(first);
    const uint64_t count = load<uint32_t>(at + 12);
    if (load<uint64_t>(at) != first || load<uint16_t>(at + 10) != kOverflow ||
        count < (kHeader - 1 + len) / page_size_ + 1) {
      fail(KVT_PAGES_HEADER, first);
      return nullptr;
    }
    if (!in_file(first, count)) {
      fail(KVT_PAGES_SHORT, first);
      return nullptr;
    }
    for (uint64_t i = 1; i < count; i++) {
      if (!see(first + i, first)) return nullptr;
    }
    tree->overflows += count;
    return at + kHeader;
  }

  bool free_list(const uint8_t* key, const uint8_t* at, uint32_t len, uint64_t number) {
    const uint64_t txnid = load<uint64_t>(key);
    if (txnid < 1 || txnid > txnid_ || len < 8 || len % 8 != 0 ||
        load<uint64_t>(at) != len / 8 - 1) {
      return fail(KVT_PAGES_FREE, number);
    }
    uint64_t before = kNone;
    for (uint32_t i = 1; i < len / 8; i++) {
      const uint64_t free_page = load<uint64_t>(at + 8 * i);
      if (free_page >= before) return fail(KVT_PAGES_FREE, number);
      if (!see(free_page, number)) return false;
      before = free_page;
    }
    return true;
  }

  KvtPages* p_;
  uint64_t page_size_ = 0, pages_ = 0, next_ = 0, txnid_ = 0, node_bytes_max_ = 0;
  const uint8_t* meta_ = nullptr;
  uint8_t* seen_ = nullptr;
  uint32_t *keys_ = nullptr, *lengths_ = nullptr;
  uint8_t* values_ = nullptr;
  uint16_t node_bytes_[kPageMax / 2] = {};  // of the page at hand, by half its offset
};

}  // namespace

int32_t kvt_pages_check(KvtPages* pages) { return Checker(pages).run(nullptr, nullptr, nullptr); }

int32_t kvt_pages_list(KvtPages* pages, uint32_t keys[], uint32_t lengths[], uint8_t values[]) {
  return Checker(pages).run(keys, lengths, values);
}
