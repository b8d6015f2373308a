// Which signal ended a process that LMDB's map may have killed: written by the dying process, since
// nobody else is there to see it.

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kvtier/native.h"

namespace {

// A torn file under a map, a wild pointer, LMDB's own asserts.
constexpr int kSignals[] = {SIGBUS, SIGSEGV, SIGABRT};
constexpr int kCount = sizeof(kSignals) / sizeof(kSignals[0]);

// The handler reads these; they are written while no handler is installed.
int target_fd = -1;
off_t target_offset = 0;
struct sigaction before[kCount];

void handle(int signal_number) {
  const int keep = errno;
  struct timespec now = {};
  clock_gettime(CLOCK_REALTIME, &now);
  const uint32_t number = static_cast<uint32_t>(signal_number), inverse = ~number;
  const uint64_t seconds = static_cast<uint64_t>(now.tv_sec);
  uint8_t record[KVT_SIGNAL_BYTES];
  memcpy(record, &number, 4);
  memcpy(record + 4, &inverse, 4);
  memcpy(record + 8, &seconds, 8);
  const ssize_t written = pwrite(target_fd, record, sizeof(record), target_offset);
  (void)written;  // what could be done about it now?
  for (int i = 0; i < kCount; i++) {
    if (kSignals[i] == signal_number) sigaction(signal_number, &before[i], nullptr);
  }
  errno = keep;
  raise(signal_number);  // blocked until we return; then it does what it would have done
}

}  // namespace

int32_t kvt_signals_record(int32_t fd, uint64_t offset) {
  kvt_signals_leave();
  target_fd = fd;
  target_offset = static_cast<off_t>(offset);
  struct sigaction ours = {};
  ours.sa_handler = handle;
  ours.sa_flags = SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  for (int i = 0; i < kCount; i++) {
    if (sigaction(kSignals[i], &ours, &before[i]) != 0) return errno;
  }
  return 0;
}

void kvt_signals_leave(void) {
  for (int i = 0; i < kCount; i++) {
    struct sigaction now = {};
    if (sigaction(kSignals[i], nullptr, &now) == 0 && now.sa_handler == handle) {
      sigaction(kSignals[i], &before[i], nullptr);
    }
  }
  target_fd = -1;
}
