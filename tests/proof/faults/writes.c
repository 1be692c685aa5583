/* Preloaded into a daemon: logs every write to the files of a store, and every sync, with their contents.
 *
 * WRITES_OF is the path of the database, WRITES_LOG the file that the records go to. The record of a write is written
 * before the call, so that a kill between the two leaves no write without a record. Other records are written when the
 * call has returned without an error, and before the caller hears of it. Changes nothing of what it sees.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, TRUNCATE, SYNC, SYNC_NAMES, UNLINK };

struct record {
    uint8_t what;
    uint8_t file; /* 0: the database, 1: its write-ahead log, 2: its journal */
    uint16_t unused;
    uint32_t length; /* of the bytes that follow */
    int64_t at;      /* offset, or size */
    int64_t time_ns; /* CLOCK_MONOTONIC */
};

static const char *const suffixes[] = {"", "-wal", "-journal"};
static char path[4096], directory[4096];
static int out = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *of = getenv("WRITES_OF"), *log = getenv("WRITES_LOG");
    if (of == NULL || log == NULL || strlen(of) >= sizeof path)
        return;
    strcpy(path, of);
    strcpy(directory, of);
    *strrchr(directory, '/') = '\0';
    out = NEXT(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

/* Which of our files `name` is, -1 if none. */
static int which(const char *name) {
    size_t length = strlen(path);
    if (out < 0 || strncmp(name, path, length) != 0)
        return -1;
    for (int file = 0; file < 3; file++)
        if (strcmp(name + length, suffixes[file]) == 0)
            return file;
    return -1;
}

/* The same of an open file; 3 for the directory of the store. */
static int which_fd(int fd) {
    char link[64], name[4096];
    if (out < 0)
        return -1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0)
        return -1;
    name[length] = '\0';
    return strcmp(name, directory) == 0 ? 3 : which(name);
}

static void say(int what, int file, int64_t at, const void *bytes, size_t length) {
    struct timespec now;
    pthread_mutex_lock(&lock);
    clock_gettime(CLOCK_MONOTONIC, &now);
    struct record record = {(uint8_t)what, (uint8_t)file, 0, (uint32_t)length, at, now.tv_sec * 1000000000LL + now.tv_nsec};
    struct iovec parts[] = {{&record, sizeof record}, {(void *)bytes, length}};
    if (writev(out, parts, 2) != (ssize_t)(sizeof record + length))
        abort();
    pthread_mutex_unlock(&lock);
}

static int opened(int fd, const char *name, int flags) {
    int file = which(name);
    if (fd >= 0 && file >= 0 && (flags & O_CREAT))
        say(OPEN, file, 0, NULL, 0);
    return fd;
}

#define OPENS(name)                                       \
    int name(const char *file, int flags, ...) {          \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                     \
        return opened(NEXT(name)(file, flags, mode), file, flags); \
    }
OPENS(open)
OPENS(open64)

static void writing(int fd, const void *bytes, size_t length, int64_t at) {
    int file = which_fd(fd);
    if (length > 0 && file >= 0)
        say(WRITE, file, at, bytes, length);
}

static ssize_t whole(int fd, ssize_t written, size_t length) {
    if (which_fd(fd) >= 0 && written != (ssize_t)length)
        abort();
    return written;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) {
    writing(fd, bytes, length, at);
    return whole(fd, NEXT(pwrite)(fd, bytes, length, at), length);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) {
    writing(fd, bytes, length, at);
    return whole(fd, NEXT(pwrite64)(fd, bytes, length, at), length);
}

static int done(int what, int fd, int result, int64_t at) {
    int file = which_fd(fd);
    if (result == 0 && file >= 0)
        say(file == 3 ? SYNC_NAMES : what, file, at, NULL, 0);
    return result;
}

int fsync(int fd) { return done(SYNC, fd, NEXT(fsync)(fd), 0); }
int fdatasync(int fd) { return done(SYNC, fd, NEXT(fdatasync)(fd), 0); }
int ftruncate(int fd, off_t size) { return done(TRUNCATE, fd, NEXT(ftruncate)(fd, size), size); }
int ftruncate64(int fd, off64_t size) { return done(TRUNCATE, fd, NEXT(ftruncate64)(fd, size), size); }

int unlink(const char *name) {
    int result = NEXT(unlink)(name), file = which(name);
    if (result == 0 && file >= 0)
        say(UNLINK, file, 0, NULL, 0);
    return result;
}
