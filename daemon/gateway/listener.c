/*
 * Accept loop. See listener.h.
 */
#include "daemon/gateway/listener.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "kernels/log.h"

#define BACKLOG 128
#define UNIX_PREFIX "unix:"

struct connection {
    int fd;
    ino_t inode; // tells a closed and reused descriptor from ours
};

struct listener {
    int fd, stop_fd, spare_fd;
    char address[160];
    char unix_path[108];            // "" for TCP
    struct connection *connections; // [max_connections]
    int n_connections, max_connections;
    unsigned long n_refused;
    int is_started;
    pthread_t thread;
    void (*accepted)(void *arg, int fd);
    void *arg;
};

static int is_unix(const char *address)
{
    return strncmp(address, UNIX_PREFIX, sizeof(UNIX_PREFIX) - 1) == 0;
}

/* "HOST:PORT" -> addresses; the caller frees. */
static struct addrinfo *resolve(const char *address, struct error *err)
{
    char host[128];
    const char *colon = strrchr(address, ':');
    const char *start = address;
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    size_t n;

    if (!colon || colon == address || !colon[1]) {
        error_set(err, ERROR_INVALID_ARGUMENT, "%s: expected HOST:PORT or unix:PATH", address);
        return NULL;
    }
    n = (size_t)(colon - address);
    if (*start == '[' && n > 2 && start[n - 1] == ']')
        start++, n -= 2;
    if (n >= sizeof(host)) {
        error_set(err, ERROR_INVALID_ARGUMENT, "the host name is too long");
        return NULL;
    }
    memcpy(host, start, n);
    host[n] = '\0';
    int status = getaddrinfo(host, colon + 1, &hints, &found);
    if (status) {
        error_set(err, ERROR_INVALID_ARGUMENT, "%s: %s", address, gai_strerror(status));
        return NULL;
    }
    return found;
}

static int is_loopback(const struct sockaddr *a)
{
    if (a->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24 == 127;
    if (a->sa_family == AF_INET6)
        return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)a)->sin6_addr);
    return 0;
}

int listener_is_local(const char *address, struct error *err)
{
    struct addrinfo *found;
    int result;

    if (is_unix(address))
        return 1;
    found = resolve(address, err);
    if (!found)
        return -1;
    result = is_loopback(found->ai_addr);
    freeaddrinfo(found);
    return result;
}

static int bind_tcp(struct listener *l, const char *address, struct error *err)
{
    int one = 1;
    int result = -1;
    struct sockaddr_storage bound;
    socklen_t n_bound = sizeof(bound);
    char host[INET6_ADDRSTRLEN], port[8];
    struct addrinfo *found = resolve(address, err);

    if (!found)
        return -1;
    l->fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* SO_REUSEADDR, never SO_REUSEPORT: two daemons must not share a port in silence. */
    if (l->fd < 0 || setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
        bind(l->fd, found->ai_addr, found->ai_addrlen) || listen(l->fd, BACKLOG) ||
        getsockname(l->fd, (struct sockaddr *)&bound, &n_bound)) {
        error_set(err, ERROR_UNAVAILABLE, "cannot listen on %s: %s", address, strerror(errno));
        goto out;
    }
    if (getnameinfo((struct sockaddr *)&bound, n_bound, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV))
        BUG("getnameinfo of a bound socket");
    snprintf(l->address, sizeof(l->address), strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    result = 0;
out:
    freeaddrinfo(found);
    return result;
}

/* A path whose socket nobody answers on is a leftover of a killed daemon. */
static void remove_stale(const struct sockaddr_un *a)
{
    struct stat st;
    int fd;

    if (lstat(a->sun_path, &st) || !S_ISSOCK(st.st_mode))
        return;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    if (connect(fd, (const struct sockaddr *)a, sizeof(*a)) && errno == ECONNREFUSED)
        unlink(a->sun_path);
    close(fd);
}

static int bind_unix(struct listener *l, const char *address, struct error *err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    const char *path = address + sizeof(UNIX_PREFIX) - 1;
    size_t n = strlen(path);

    if (n == 0 || n >= sizeof(a.sun_path))
        return error_set(err, ERROR_INVALID_ARGUMENT, "a unix path has 1 to %zu bytes",
                         sizeof(a.sun_path) - 1);
    memcpy(a.sun_path, path, n + 1);
    remove_stale(&a);
    l->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->fd < 0 || bind(l->fd, (struct sockaddr *)&a, sizeof(a)) || chmod(path, 0600) ||
        listen(l->fd, BACKLOG))
        return error_set(err, ERROR_UNAVAILABLE, "cannot listen on %s: %s", address,
                         strerror(errno));
    memcpy(l->unix_path, path, n + 1);
    snprintf(l->address, sizeof(l->address), "%s", address);
    return 0;
}

struct listener *listener_open(const char *address, int max_connections, struct error *err)
{
    struct listener *l = xcalloc(1, sizeof(*l));

    l->fd = -1;
    l->spare_fd = -1;
    l->max_connections = max_connections;
    l->connections = xcalloc((size_t)max_connections, sizeof(*l->connections));
    l->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (l->stop_fd < 0)
        die("eventfd: %s", strerror(errno));
    if (is_unix(address) ? bind_unix(l, address, err) : bind_tcp(l, address, err)) {
        listener_close(l);
        return NULL;
    }
    return l;
}

const char *listener_address(const struct listener *l)
{
    return l->address;
}

static int is_open(const struct connection *c)
{
    struct stat st;

    return fstat(c->fd, &st) == 0 && st.st_ino == c->inode;
}

/* Forgets the connections that their owner has closed; `fd` is none of them, -1: none is new. */
static void forget_closed(struct listener *l, int fd)
{
    int n = 0;

    for (int i = 0; i < l->n_connections; i++)
        if (l->connections[i].fd != fd && is_open(&l->connections[i]))
            l->connections[n++] = l->connections[i];
    l->n_connections = n;
}

/* Notes a new connection; 0 when there is no room. Closed ones are only looked for when the list is
 * full. */
static int note_connection(struct listener *l, int fd)
{
    struct stat st;

    if (l->n_connections == l->max_connections)
        forget_closed(l, fd);
    if (l->n_connections == l->max_connections || fstat(fd, &st))
        return 0;
    l->connections[l->n_connections++] = (struct connection){fd, st.st_ino};
    return 1;
}

static void refuse(struct listener *l, const char *why)
{
    if (l->n_refused++ % 1000 == 0)
        log_warn("listener", "connection refused: %s (%lu so far)", why, l->n_refused);
}

static void out_of_descriptors(struct listener *l)
{
    int fd;

    if (l->spare_fd >= 0)
        close(l->spare_fd);
    fd = accept(l->fd, NULL, NULL);
    if (fd >= 0)
        close(fd);
    l->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    refuse(l, "no file descriptor is left");
    if (l->spare_fd < 0 || fd < 0)
        poll(NULL, 0, 20); // somebody else is closing theirs
}

static void *listen_loop(void *arg)
{
    struct listener *l = arg;
    struct pollfd watched[2] = {{.fd = l->fd, .events = POLLIN},
                                {.fd = l->stop_fd, .events = POLLIN}};
    int one = 1;

    l->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    for (;;) {
        if (poll(watched, 2, -1) < 0) {
            if (errno != EINTR)
                die("poll: %s", strerror(errno));
            continue;
        }
        if (watched[1].revents)
            return NULL;
        int fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE)
                out_of_descriptors(l);
            continue; // others concern one connection only
        }
        if (!note_connection(l, fd)) {
            close(fd);
            refuse(l, "--max-connections are open");
            continue;
        }
        if (!l->unix_path[0])
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        l->accepted(l->arg, fd);
    }
}

void listener_start(struct listener *l, void (*accepted)(void *arg, int fd), void *arg)
{
    l->accepted = accepted;
    l->arg = arg;
    if (pthread_create(&l->thread, NULL, listen_loop, l))
        die("cannot start the listener's thread");
    l->is_started = 1;
}

void listener_stop(struct listener *l)
{
    uint64_t one = 1;

    if (l->is_started) {
        if (write(l->stop_fd, &one, sizeof(one)) != sizeof(one))
            die("eventfd: %s", strerror(errno));
        pthread_join(l->thread, NULL);
        l->is_started = 0;
    }
    if (l->fd >= 0)
        close(l->fd);
    l->fd = -1;
    if (l->unix_path[0])
        unlink(l->unix_path);
    l->unix_path[0] = '\0';
}

/* Calls `look` with each open connection, as a copy that cannot be closed and reused meanwhile; the
 * sum of what it says. */
static int visit_open(struct listener *l, int (*look)(int fd))
{
    int sum = 0;

    for (int i = 0; i < l->n_connections; i++) {
        struct connection copy = {dup(l->connections[i].fd), l->connections[i].inode};

        if (copy.fd < 0)
            continue;
        if (is_open(&copy))
            sum += look(copy.fd);
        close(copy.fd);
    }
    return sum;
}

static int has_unsent(int fd)
{
    int n_bytes = 0;

    return ioctl(fd, SIOCOUTQ, &n_bytes) == 0 && n_bytes > 0;
}

int listener_n_unsent(struct listener *l)
{
    return visit_open(l, has_unsent);
}

static int end_reading(int fd)
{
    return shutdown(fd, SHUT_RD);
}

void listener_end_reading(struct listener *l)
{
    visit_open(l, end_reading);
}

int listener_n_connections(struct listener *l)
{
    forget_closed(l, -1);
    return l->n_connections;
}

void listener_hold_writes(int fd, int is_held)
{
    setsockopt(fd, IPPROTO_TCP, TCP_CORK, &is_held, sizeof(is_held));
}

void listener_close(struct listener *l)
{
    if (!l)
        return;
    listener_stop(l);
    if (l->spare_fd >= 0)
        close(l->spare_fd);
    close(l->stop_fd);
    free(l->connections);
    free(l);
}
