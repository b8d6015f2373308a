// Batches over files (slots of the SSD tier), and giving memory its pages before it is used.

#include <errno.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

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

int32_t kvt_slots_write(size_t n, const int32_t fd[], const uint64_t offset[],
                        const void* const header[], const void* const payload[],
                        const uint64_t payload_len[], int32_t err[]) {
  int32_t failed = 0;
  for (size_t i = 0; i < n; i++) {
    err[i] = transfer_all(pwritev, fd[i], offset[i], const_cast<void*>(header[i]),
                          const_cast<void*>(payload[i]), payload_len[i]);
    failed += err[i] != 0;
  }
  return failed;
}

int32_t kvt_slots_read(size_t n, const int32_t fd[], const uint64_t offset[],
                       void* const header_out[], void* const payload_out[],
                       const uint64_t payload_len[], const uint64_t size[],
                       uint64_t checksum_out[], int32_t err[]) {
  const KvtBytesOps* ops = kvt_bytes_ops();
  int32_t failed = 0;
  for (size_t i = 0; i < n; i++) {
    err[i] = size[i] > payload_len[i]
                 ? EINVAL
                 : transfer_all(preadv, fd[i], offset[i], header_out[i], payload_out[i],
                                payload_len[i]);
    checksum_out[i] = err[i] == 0 ? ops->checksum(payload_out[i], size[i]) : 0;
    failed += err[i] != 0;
  }
  return failed;
}

int32_t kvt_prefault(void* ptr, uint64_t len, int32_t* err) {
  *err = populate(ptr, len);
  return *err;
}
