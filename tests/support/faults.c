// Loaded with LD_PRELOAD: counts the file operations below a folder, and lets one of them fail.
// Calls go to the kernel directly, so that nothing here calls itself.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long count, target = -1;
static int code, log_fd = -1;

// Watch what is below `folder`; the operation number `number` (from 0) fails with `error`, none when
// it is negative. Operations are listed in the file `log`, which may be -1.
void fault_arm(const char *folder, long number, int error, int log) {
    strncpy(root, folder, sizeof root - 1);
    count = 0;
    target = number;
    code = error;
    log_fd = log;
}

static int hit(const char *what, int dirfd, const char *path) {
    char full[2 * PATH_MAX], link[64];
    ssize_t length = 0;
    int saved = errno;
    if (!root[0]) return 0;
    if (!path || path[0] != '/') {
        if (dirfd == AT_FDCWD) {
            if (syscall(SYS_getcwd, full, PATH_MAX) < 0) full[0] = 0;
            length = strlen(full);
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            length = syscall(SYS_readlink, link, full, PATH_MAX);
        }
        if (length < 0) length = 0;
        full[length] = 0;
    }
    if (path) {
        if (path[0] == '/') length = 0;
        snprintf(full + length, sizeof full - length, "%s%s", path[0] == '/' ? "" : "/", path);
    }
    errno = saved;
    if (strncmp(full, root, strlen(root))) return 0;
    if (log_fd >= 0) {
        char line[2 * PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s\t%s\n", what, full + strlen(root));
        syscall(SYS_write, log_fd, line, size);
        errno = saved;
    }
    if (__sync_fetch_and_add(&count, 1) != target) return 0;
    errno = code;
    return 1;
}

#define CHECK(what, dirfd, path, failure) \
    if (hit(what, dirfd, path)) return failure
#define NEXT(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

static int open_at(int dirfd, const char *path, int flags, mode_t mode) {
    CHECK(flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open", dirfd, path, -1);
    return syscall(SYS_openat, dirfd, path, flags, mode);
}

#define MODE(flags, mode)                                  \
    mode_t mode = 0;                                       \
    if (flags & (O_CREAT | O_TMPFILE)) {                   \
        va_list list;                                      \
        va_start(list, flags);                             \
        mode = va_arg(list, int);                          \
        va_end(list);                                      \
    }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int fd, const char *path, int flags, ...) { MODE(flags, mode) return open_at(fd, path, flags, mode); }
int openat64(int fd, const char *path, int flags, ...) { MODE(flags, mode) return open_at(fd, path, flags, mode); }

FILE *fopen(const char *path, const char *mode) {
    CHECK(strpbrk(mode, "wa+") ? "create" : "open", AT_FDCWD, path, NULL);
    return NEXT(FILE *, "fopen", const char *, const char *)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    CHECK(strpbrk(mode, "wa+") ? "create" : "open", AT_FDCWD, path, NULL);
    return NEXT(FILE *, "fopen64", const char *, const char *)(path, mode);
}
DIR *opendir(const char *path) {
    CHECK("list", AT_FDCWD, path, NULL);
    return NEXT(DIR *, "opendir", const char *)(path);
}
DIR *fdopendir(int fd) {
    CHECK("list", fd, NULL, NULL);
    return NEXT(DIR *, "fdopendir", int)(fd);
}

ssize_t read(int fd, void *data, size_t size) {
    CHECK("read", fd, NULL, -1);
    return syscall(SYS_read, fd, data, size);
}
ssize_t pread(int fd, void *data, size_t size, off_t at) {
    CHECK("read", fd, NULL, -1);
    return syscall(SYS_pread64, fd, data, size, at);
}
ssize_t pread64(int fd, void *data, size_t size, off_t at) { return pread(fd, data, size, at); }
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) {
    CHECK("read", fd, NULL, -1);
    return syscall(SYS_preadv, fd, parts, count, at, 0);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t at) { return preadv(fd, parts, count, at); }
ssize_t write(int fd, const void *data, size_t size) {
    CHECK("write", fd, NULL, -1);
    return syscall(SYS_write, fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    CHECK("write", fd, NULL, -1);
    return syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return pwrite(fd, data, size, at); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    CHECK("copy", out, NULL, -1);
    return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    CHECK("copy", out, NULL, -1);
    return syscall(SYS_sendfile, out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) { return sendfile(out, in, at, size); }
int ftruncate(int fd, off_t size) {
    CHECK("truncate", fd, NULL, -1);
    return syscall(SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int fsync(int fd) {
    CHECK("sync", fd, NULL, -1);
    return syscall(SYS_fsync, fd);
}
int flock(int fd, int how) {
    CHECK("lock", fd, NULL, -1);
    return syscall(SYS_flock, fd, how);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    CHECK("rename", to, new, -1);
    return syscall(SYS_renameat2, from, old, to, new, flags);
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int mkdirat(int fd, const char *path, mode_t mode) {
    CHECK("mkdir", fd, path, -1);
    return syscall(SYS_mkdirat, fd, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int fd, const char *path, int flags) {
    CHECK("remove", fd, path, -1);
    return syscall(SYS_unlinkat, fd, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int chmod(const char *path, mode_t mode) {
    CHECK("chmod", AT_FDCWD, path, -1);
    return syscall(SYS_fchmodat, AT_FDCWD, path, mode);
}
int fstatat(int fd, const char *path, struct stat *found, int flags) {
    CHECK("stat", fd, path, -1);
    return syscall(SYS_newfstatat, fd, path, found, flags);
}
int fstatat64(int fd, const char *path, struct stat64 *found, int flags) {
    return fstatat(fd, path, (struct stat *)found, flags);
}
int stat(const char *path, struct stat *found) { return fstatat(AT_FDCWD, path, found, 0); }
int lstat(const char *path, struct stat *found) { return fstatat(AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW); }
int stat64(const char *path, struct stat64 *found) { return stat(path, (struct stat *)found); }
int lstat64(const char *path, struct stat64 *found) { return lstat(path, (struct stat *)found); }
