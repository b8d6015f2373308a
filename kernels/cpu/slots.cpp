// Batches over files (slots of the SSD tier), and giving memory its pages before it is used.

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

#include "kvtier/bytes.h"
#include "kvtier/native.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace {

using Transfer = ssize_t (*)(int, const struct iovec*, int, off_t);

// All of header and payload, however many calls it takes. 0 or errno.
int32_t transfer_all(Transfer transfer, int fd, uint64_t offset, void* header, void* payload,
                     uint64_t payload_len) {
  struct iovec parts[2] = {{header, KVT_HEADER_BYTES}, {payload, payload_len}};
  const uint64_t total = KVT_HEADER_BYTES + payload_len;
  uint64_t done = 0;
  while (done < total) {
    const int first = parts[0].iov_len == 0 ? 1 : 0;
    const ssize_t moved =
        transfer(fd, parts + first, 2 - first, static_cast<off_t>(offset + done));
    if (moved < 0) {
      if (errno == EINTR) continue;
      // After a short transfer (file end) O_DIRECT finds our next offset unaligned: same fault.
      return errno == EINVAL && done > 0 ? EIO : errno;
    }
    if (moved == 0) return EIO;
    done += static_cast<uint64_t>(moved);
    uint64_t used = static_cast<uint64_t>(moved);
    for (struct iovec& part : parts) {
      const uint64_t here = used < part.iov_len ? used : part.iov_len;
      part.iov_base = static_cast<uint8_t*>(part.iov_base) + here;
      part.iov_len -= here;
      used -= here;
    }
  }
  return 0;
}

// `step(i)` for each i < n, up to `depth` of them at once; the calling thread takes part. A thread
// that cannot be had (limits) is done without. Threads live as long as the call: making one costs
// tens of microseconds, a slot's transfer more, and nobody needs to end a pool.
template <typename Step>
class Spread {
 public:
  Spread(size_t n, const Step& step) : n_(n), step_(step) {}

  void run(uint32_t depth) {
    pthread_t threads[kDepthMax - 1];
    size_t started = 0;
    const size_t wanted = depth < n_ ? depth : n_;
    sigset_t all, before;
    sigfillset(&all);
    // Signals of the process go to its own threads; faults of a thread's own stay deliverable.
    const int faults[] = {SIGBUS, SIGSEGV, SIGABRT, SIGFPE, SIGILL};
    for (const int fault : faults) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started + 1 < wanted && started < kDepthMax - 1) {
      if (pthread_create(&threads[started], nullptr, enter, this) != 0) break;
      started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    work();
    for (size_t i = 0; i < started; i++) pthread_join(threads[i], nullptr);
  }

 private:
  static constexpr size_t kDepthMax = 64;

  static void* enter(void* self) {
    static_cast<Spread*>(self)->work();
    return nullptr;
  }

  void work() {
    for (size_t i = next_++; i < n_; i = next_++) step_(i);
  }

  const size_t n_;
  const Step& step_;
  std::atomic<size_t> next_{0};
};

template <typename Step>
void spread(size_t n, uint32_t depth, const Step& step) {
  Spread<Step>(n, step).run(depth);
}

int32_t count_failed(size_t n, const int32_t err[]) {
  int32_t failed = 0;
  for (size_t i = 0; i < n; i++) failed += err[i] != 0;
  return failed;
}

// One page's memory, by an atomic "or 0" that the kernel does for us: contents are kept even if
// others write meanwhile, and where our own store would be a SIGBUS the answer is EFAULT.
int32_t touch(void* word) {
  uint32_t nobody = 0;
  const long result = syscall(SYS_futex, &nobody, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, 0, word,
                              FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_LT, 0));
  return result < 0 ? errno : 0;
}

int32_t populate(void* ptr, uint64_t len) {
  if (len == 0) return 0;
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t start = reinterpret_cast<uint64_t>(ptr) / page * page;
  const uint64_t end = (reinterpret_cast<uint64_t>(ptr) + len + page - 1) / page * page;
  for (;;) {
    if (madvise(reinterpret_cast<void*>(start), end - start, MADV_POPULATE_WRITE) == 0) return 0;
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) return errno;
    break;  // an older kernel, or a mapping (some devices) that cannot be populated
  }
  for (uint64_t address = start; address < end; address += page) {
    const int32_t error = touch(reinterpret_cast<void*>(address));
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace

int32_t kvt_slots_write(size_t n, uint32_t depth, const int32_t fd[], const uint64_t offset[],
                        const void* const header[], const void* const payload[],
                        const uint64_t payload_len[], int32_t err[]) {
  spread(n, depth, [&](size_t i) {
    err[i] = transfer_all(pwritev, fd[i], offset[i], const_cast<void*>(header[i]),
                          const_cast<void*>(payload[i]), payload_len[i]);
  });
  return count_failed(n, err);
}

int32_t kvt_slots_read(size_t n, uint32_t depth, const int32_t fd[], const uint64_t offset[],
                       void* const header_out[], void* const payload_out[],
                       const uint64_t payload_len[], const uint64_t size[],
                       uint64_t checksum_out[], int32_t err[]) {
  const KvtBytesOps* ops = kvt_bytes_ops();
  spread(n, depth, [&](size_t i) {
    err[i] = size[i] > payload_len[i]
                 ? EINVAL
                 : transfer_all(preadv, fd[i], offset[i], header_out[i], payload_out[i],
                                payload_len[i]);
    checksum_out[i] = err[i] == 0 ? ops->checksum(payload_out[i], size[i]) : 0;
  });
  return count_failed(n, err);
}

int32_t kvt_prefault(void* ptr, uint64_t len, int32_t* err) {
  *err = populate(ptr, len);
  return *err;
}
