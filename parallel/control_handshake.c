/*
 * How workers reach the gateway: one listening socket, open only until every rank is in.
 *
 * Owns the pending connections. Anyone who can reach the port can connect, so nothing that arrives
 * before the secret may cost more than a slot of a small table for a moment; after the launch
 * nobody listens. Must not know what is said afterwards.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/control_wire.h"

#define N_PENDING_MAX 64
#define N_WARNINGS_MAX 16
#define SILENCE_MS 2000 // a connection may take this long to present the secret
#define LOOK_MS 100     // between looks at deadlines, and between attempts to connect
#define CONNECT_MS 2000 // for one of the gateway's addresses to answer
#define ACK_MS 10000    // for the gateway to accept the secret
#define FULL_HELLO_BYTES (FRAME_HEADER_BYTES + HELLO_BYTES)

/* ---- listening ---- */

static void add_address(struct control_address *a, const struct sockaddr *at, socklen_t n_bytes)
{
    if (a->n == CONTROL_N_ADDRESSES_MAX)
        return;
    memcpy(&a->at[a->n], at, n_bytes);
    a->n_bytes[a->n++] = n_bytes;
}

/* Every IPv4 address of this host that is not loopback, with `port` (network order). */
static void add_host_addresses(struct control_address *a, in_port_t port)
{
    struct ifaddrs *all;
    if (getifaddrs(&all))
        die("getifaddrs: %s", strerror(errno));
    for (struct ifaddrs *i = all; i; i = i->ifa_next) {
        if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || !(i->ifa_flags & IFF_UP) ||
            (i->ifa_flags & IFF_LOOPBACK))
            continue;
        struct sockaddr_in at;
        memcpy(&at, i->ifa_addr, sizeof(at));
        at.sin_port = port;
        add_address(a, (struct sockaddr *)&at, sizeof(at));
    }
    freeifaddrs(all);
    if (a->n == 0)
        die("no network address by which the other hosts could reach this one");
}

static int listen_at(const struct sockaddr *at, socklen_t n_bytes, const char *host)
{
    int fd = socket(at->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        die("socket: %s", strerror(errno));
    if (bind(fd, at, n_bytes) || listen(fd, SOMAXCONN))
        die("control cannot listen on %s: %s", host, strerror(errno));
    return fd;
}

static int listen_on_host(const char *host)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found;
    int rc = getaddrinfo(host, NULL, &hints, &found);
    if (rc)
        die("control cannot listen on %s: %s", host, gai_strerror(rc));
    int fd = listen_at(found->ai_addr, found->ai_addrlen, host);
    freeaddrinfo(found);
    return fd;
}

int control_listen(struct control_address *a, const char *host, int all_on_this_host)
{
    if (!host && all_on_this_host)
        host = "127.0.0.1";
    struct sockaddr_in any = {.sin_family = AF_INET};
    int fd = host ? listen_on_host(host)
                  : listen_at((const struct sockaddr *)&any, sizeof(any), "any address");
    struct sockaddr_storage bound = {0};
    socklen_t n_bytes = sizeof(bound);
    if (getsockname(fd, (struct sockaddr *)&bound, &n_bytes))
        die("getsockname: %s", strerror(errno));
    a->n = 0;
    if (host)
        add_address(a, (struct sockaddr *)&bound, n_bytes);
    else
        add_host_addresses(a, ((struct sockaddr_in *)&bound)->sin_port);
    return fd;
}

/* ---- accepting ---- */

struct pending {
    int fd;
    int64_t deadline_ms;
    size_t n; // bytes of `hello` so far
    uint8_t hello[FULL_HELLO_BYTES];
};

struct accepting {
    const uint8_t *secret;
    int world, n_missing;
    int *fds; // [world], -1: missing
    int n_refused, n_pending;
    struct pending pending[N_PENDING_MAX]; // oldest first
};

static void drop_pending(struct accepting *a, int i)
{
    a->n_pending--;
    memmove(&a->pending[i], &a->pending[i + 1], (size_t)(a->n_pending - i) * sizeof(a->pending[0]));
}

static void refuse(struct accepting *a, int i, const char *why)
{
    if (a->n_refused++ < N_WARNINGS_MAX)
        log_warn("control", "a connection %s: closed", why);
    close(a->pending[i].fd);
    drop_pending(a, i);
}

static void take_connections(struct accepting *a, int listen_fd)
{
    for (;;) {
        int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0)
            die("accept: %s", strerror(errno));
        if (a->n_pending == N_PENDING_MAX)
            refuse(a, 0, "was the oldest of too many that were silent");
        a->pending[a->n_pending++] =
            (struct pending){.fd = fd, .deadline_ms = control_now_ms() + SILENCE_MS};
    }
}

/* Takes the same time wherever the first difference is. */
static int secrets_equal(const uint8_t *a, const uint8_t *b)
{
    uint8_t difference = 0;
    for (int i = 0; i < CONTROL_SECRET_BYTES; i++)
        difference |= (uint8_t)(a[i] ^ b[i]);
    return difference == 0;
}

/* The rank that `hello` proves to be, or -1: a stranger. Another version of ourselves dies. */
static int hello_rank(const struct accepting *a, const uint8_t *hello)
{
    struct frame_header h;
    int32_t rank;
    const uint8_t *secret = hello + FRAME_HEADER_BYTES;
    const char *version = (const char *)secret + CONTROL_SECRET_BYTES;
    if (frame_header_decode(&h, hello) || h.type != CONTROL_HELLO || h.n_bytes != HELLO_BYTES ||
        !secrets_equal(secret, a->secret))
        return -1;
    memcpy(&rank, version + CONTROL_VERSION_BYTES, sizeof(rank));
    if (strncmp(version, INTERNVLD_VERSION, CONTROL_VERSION_BYTES) != 0)
        die("rank %d runs version %.*s, the gateway runs %s", rank, CONTROL_VERSION_BYTES, version,
            INTERNVLD_VERSION);
    return rank >= 1 && rank < a->world ? rank : -1;
}

static void finish_hello(struct accepting *a, int i)
{
    uint8_t ack[FRAME_HEADER_BYTES];
    int fd = a->pending[i].fd, rank = hello_rank(a, a->pending[i].hello);
    if (rank < 0) {
        refuse(a, i, "did not present this job's secret");
        return;
    }
    frame_header_encode(ack, CONTROL_HELLO, 0);
    if (send(fd, ack, sizeof(ack), MSG_NOSIGNAL) != (ssize_t)sizeof(ack)) {
        refuse(a, i, "closed during its handshake"); /* the worker tries again */
        return;
    }
    drop_pending(a, i);
    control_socket_options(fd);
    if (a->fds[rank] >= 0)
        close(a->fds[rank]); /* it gave up on that one */
    else
        a->n_missing--;
    a->fds[rank] = fd;
}

static void read_pending(struct accepting *a, int i)
{
    struct pending *p = &a->pending[i];
    ssize_t n = recv(p->fd, p->hello + p->n, sizeof(p->hello) - p->n, 0);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (n <= 0) {
        refuse(a, i, "closed during its handshake");
        return;
    }
    p->n += (size_t)n;
    if (p->n == sizeof(p->hello))
        finish_hello(a, i);
}

static void accept_some(struct accepting *a, int listen_fd)
{
    struct pollfd polled[1 + N_PENDING_MAX] = {{.fd = listen_fd, .events = POLLIN}};
    int n = a->n_pending;
    for (int i = 0; i < n; i++)
        polled[1 + i] = (struct pollfd){.fd = a->pending[i].fd, .events = POLLIN};
    if (poll(polled, (nfds_t)n + 1, LOOK_MS) < 0 && errno != EINTR)
        die("poll: %s", strerror(errno));
    int64_t now_ms = control_now_ms();
    for (int i = n - 1; i >= 0; i--) { /* backwards: entries leave the table on the way */
        if (polled[1 + i].revents)
            read_pending(a, i);
        else if (now_ms > a->pending[i].deadline_ms)
            refuse(a, i, "stayed silent");
    }
    if (polled[0].revents)
        take_connections(a, listen_fd);
}

static _Noreturn void die_missing(const struct accepting *a, int timeout_ms)
{
    char ranks[128] = "";
    size_t n = 0;
    for (int r = 1; r < a->world && n < sizeof(ranks); r++)
        if (a->fds[r] < 0)
            n += (size_t)snprintf(ranks + n, sizeof(ranks) - n, " %d", r);
    die("no control connection from %d rank(s) within %d s:%s", a->n_missing, timeout_ms / 1000,
        ranks);
}

void control_accept(int listen_fd, const uint8_t *secret, int world, int *fds, int timeout_ms)
{
    struct accepting a = {.secret = secret, .world = world, .n_missing = world - 1, .fds = fds};
    int64_t deadline_ms = control_now_ms() + timeout_ms;
    for (int r = 0; r < world; r++)
        fds[r] = -1;
    while (a.n_missing > 0) {
        if (control_now_ms() > deadline_ms)
            die_missing(&a, timeout_ms);
        accept_some(&a, listen_fd);
    }
    while (a.n_pending > 0)
        refuse(&a, 0, "came when every rank was in");
    if (a.n_refused > N_WARNINGS_MAX)
        log_warn("control", "%d more connections were closed", a.n_refused - N_WARNINGS_MAX);
}

/* ---- connecting ---- */

static void set_timeout(int fd, int option, int timeout_ms)
{
    struct timeval limit = {.tv_sec = timeout_ms / 1000, .tv_usec = timeout_ms % 1000 * 1000};
    if (setsockopt(fd, SOL_SOCKET, option, &limit, sizeof(limit)))
        die("setsockopt: %s", strerror(errno));
}

static int connect_at(const struct sockaddr *at, socklen_t n_bytes)
{
    int fd = socket(at->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket: %s", strerror(errno));
    set_timeout(fd, SO_SNDTIMEO, CONNECT_MS); /* on Linux it also bounds connect() */
    set_timeout(fd, SO_RCVTIMEO, ACK_MS);
    if (connect(fd, at, n_bytes) == 0)
        return fd;
    close(fd);
    return -1;
}

/* 1 when the gateway has accepted; a gateway that refuses just closes. */
static int say_hello(int fd, const uint8_t *secret, int32_t rank)
{
    uint8_t hello[FULL_HELLO_BYTES] = {0}, ack[FRAME_HEADER_BYTES];
    struct frame_header h;
    uint8_t *version = hello + FRAME_HEADER_BYTES + CONTROL_SECRET_BYTES;
    _Static_assert(sizeof(INTERNVLD_VERSION) <= CONTROL_VERSION_BYTES, "version too long");
    frame_header_encode(hello, CONTROL_HELLO, HELLO_BYTES);
    memcpy(hello + FRAME_HEADER_BYTES, secret, CONTROL_SECRET_BYTES);
    memcpy(version, INTERNVLD_VERSION, sizeof(INTERNVLD_VERSION));
    memcpy(version + CONTROL_VERSION_BYTES, &rank, sizeof(rank));
    return send(fd, hello, sizeof(hello), MSG_NOSIGNAL) == (ssize_t)sizeof(hello) &&
           recv(fd, ack, sizeof(ack), MSG_WAITALL) == (ssize_t)sizeof(ack) &&
           frame_header_decode(&h, ack) == 0 && h.type == CONTROL_HELLO;
}

int control_connect(const struct control_address *a, int rank, int timeout_ms)
{
    const struct timespec pause = {.tv_nsec = LOOK_MS * 1000000};
    int64_t deadline_ms = control_now_ms() + timeout_ms;
    while (control_now_ms() < deadline_ms) {
        for (int i = 0; i < a->n; i++) {
            int fd = connect_at((const struct sockaddr *)&a->at[i], a->n_bytes[i]);
            if (fd < 0)
                continue;
            if (say_hello(fd, a->secret, rank)) {
                set_timeout(fd, SO_SNDTIMEO, 0); /* none */
                set_timeout(fd, SO_RCVTIMEO, 0);
                control_socket_options(fd);
                return fd;
            }
            close(fd);
        }
        nanosleep(&pause, NULL);
    }
    die("rank 0 cannot be reached within %d s at any of its %d address(es): is a firewall between "
        "the hosts?",
        timeout_ms / 1000, a->n);
}
