/* Counts what a process does to the file system, and strikes at the n-th deed (LD_PRELOAD; see tests/torture/kills.py).

   A deed is a write to a regular file other than stdout and stderr, the making, renaming or removing of a file or folder,
   a truncation, or an fsync. Nothing is counted before torture_arm; the count lies in memory that forks share. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, BEFORE, TORN, FULL, FAULT }; /* only count; kill before it; kill half-way; no room from then on; EIO once */

static long *count, at = -1;
static int armed, mode;

__attribute__((constructor)) static void begin(void) {
    count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void torture_arm(int how, long n) { *count = 0, at = n, mode = how, armed = 1; }
long torture_count(void) { return *count; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* What becomes of a deed: 0 it is done; -1 it fails with errno; 1 it is done by half or whole, and the process dies. */
static int deed(int makes) {
    if (!armed) return 0;
    long n = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    if (mode == FULL && n >= at && makes) { errno = ENOSPC; return -1; }
    if (n != at) return 0;
    if (mode == BEFORE) die();
    if (mode == FAULT) { errno = EIO; return -1; }
    return mode == TORN;
}

static int counts(int fd) {
    struct stat found;
    int kept = errno, regular = armed && fd > 2 && !fstat(fd, &found) && S_ISREG(found.st_mode);
    errno = kept;
    return regular;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define DEED(type, name, declared, given, which, makes, half)                                                      \
    type name declared {                                                                                           \
        REAL(name);                                                                                                \
        int what = (which) ? deed(makes) : 0;                                                                      \
        if (what < 0) return -1;                                                                                   \
        if (what > 0) { half; die(); }                                                                             \
        return real given;                                                                                         \
    }

DEED(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n), counts(fd), 1, real(fd, data, n / 2))
DEED(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t to), (fd, data, n, to), counts(fd), 1, real(fd, data, n / 2, to))
DEED(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t to), (fd, data, n, to), counts(fd), 1, real(fd, data, n / 2, to))
DEED(ssize_t, writev, (int fd, const struct iovec *parts, int n), (fd, parts, n), counts(fd), 1, real(fd, parts, n / 2))
DEED(int, ftruncate, (int fd, off_t size), (fd, size), counts(fd), 1, real(fd, size))
DEED(int, ftruncate64, (int fd, off64_t size), (fd, size), counts(fd), 1, real(fd, size))
DEED(int, fsync, (int fd), (fd), counts(fd), 1, real(fd))
DEED(int, fdatasync, (int fd), (fd), counts(fd), 1, real(fd))
DEED(int, rename, (const char *from, const char *to), (from, to), 1, 1, real(from, to))
DEED(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), 1, 1, real(a, from, b, to))
DEED(int, mkdir, (const char *path, mode_t rights), (path, rights), 1, 1, real(path, rights))
DEED(int, mkdirat, (int at_fd, const char *path, mode_t rights), (at_fd, path, rights), 1, 1, real(at_fd, path, rights))
DEED(int, unlink, (const char *path), (path), 1, 0, real(path))
DEED(int, unlinkat, (int at_fd, const char *path, int flags), (at_fd, path, flags), 1, 0, real(at_fd, path, flags))
DEED(int, rmdir, (const char *path), (path), 1, 0, real(path))

#define OPEN(name, declared, given)                                                                                \
    int name declared {                                                                                            \
        REAL(name);                                                                                                \
        mode_t rights = 0;                                                                                         \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); rights = va_arg(rest, mode_t); va_end(rest); } \
        int what = flags & (O_CREAT | O_TRUNC) ? deed(1) : 0;                                                      \
        if (what < 0) return -1;                                                                                   \
        int made = real given;                                                                                     \
        if (what > 0) die();                                                                                       \
        return made;                                                                                               \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, rights))
OPEN(open64, (const char *path, int flags, ...), (path, flags, rights))
OPEN(openat, (int fd, const char *path, int flags, ...), (fd, path, flags, rights))
OPEN(openat64, (int fd, const char *path, int flags, ...), (fd, path, flags, rights))
