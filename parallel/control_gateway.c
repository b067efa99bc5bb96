/*
 * The gateway's end of control: one non-blocking connection a worker under one epoll.
 *
 * Owns the connections, the queues of what their sockets have not taken, and the pings. Belongs to
 * one thread (the engine's). Must not know what a payload means; it reads no byte past the message
 * it returns, so that epoll (level-triggered) tells whether there is more.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/control_wire.h"

/* A rank that stops is noticed TIMEOUT_MS later at least, and PING_MS + TIMEOUT_MS + 2 · TICK_MS at
 * most: 1.0 to 1.4 s. A worker's answering thread sleeps otherwise, so that it gets a core at once
 * also where many wait for one. */
#define PING_MS 200
#define TICK_MS 100
#define SLEPT_MS 500 // since the last control_next(): twice what the caller promises
#define TIMEOUT_MS 1000

struct outgoing {
    struct outgoing *next;
    struct message *m;
};

enum peer_state {
    PEER_UP,
    PEER_STOPPING, // was sent CONTROL_STOP: may close
    PEER_GONE,
};

/* One ping at a time. Until it has left, a socket that takes bytes is a sign of life (a long
 * message may be in front of it); afterwards only what the peer sends is. */
enum ping_state { PING_NONE, PING_QUEUED, PING_SENT };

struct peer {
    int rank, fd;
    enum peer_state state;
    int polls_out; // EPOLLOUT is asked for

    struct outgoing *first, **last;
    uint64_t n_first_sent; // bytes of the first one's frame that the socket took
    uint64_t n_queued;     // bytes that it did not

    uint8_t header[FRAME_HEADER_BYTES];
    size_t n_header;    // bytes of `header` so far
    struct message *in; // being received, once its header is whole
    uint64_t n_in;      // bytes of its payload so far

    enum ping_state ping;
    int64_t alive_ms, next_ping_ms;
    int64_t longest_ms; // that an answer was waited for, once it is worth a word
};

struct gateway_end {
    struct topology topology;
    int epoll_fd, timer_fd;
    int timeout_ms;
    int64_t last_next_ms;
    struct peer *peers; // [world], the first unused
};

/* ---- opening ---- */

static void epoll_set(struct gateway_end *g, int how, int fd, int rank, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.u32 = (uint32_t)rank};
    if (epoll_ctl(g->epoll_fd, how, fd, &e))
        die("epoll_ctl: %s", strerror(errno));
}

static void open_timer(struct gateway_end *g)
{
    const struct timespec tick = {.tv_nsec = TICK_MS * 1000000};
    const struct itimerspec each = {.it_interval = tick, .it_value = tick};
    g->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (g->timer_fd < 0 || timerfd_settime(g->timer_fd, 0, &each, NULL))
        die("timerfd: %s", strerror(errno));
    epoll_set(g, EPOLL_CTL_ADD, g->timer_fd, 0, EPOLLIN);
}

struct gateway_end *gateway_end_open(const struct topology *t, const int *fds)
{
    struct gateway_end *g = xcalloc(1, sizeof(*g));
    int64_t now_ms = control_now_ms();
    g->topology = *t;
    g->timeout_ms = TIMEOUT_MS;
    g->last_next_ms = now_ms;
    g->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (g->epoll_fd < 0)
        die("epoll_create1: %s", strerror(errno));
    open_timer(g);
    g->peers = xcalloc((size_t)t->world, sizeof(*g->peers));
    for (int r = 1; r < t->world; r++) {
        struct peer *p = &g->peers[r];
        p->rank = r;
        p->fd = fds[r];
        p->last = &p->first;
        p->next_ping_ms = now_ms + PING_MS;
        epoll_set(g, EPOLL_CTL_ADD, p->fd, r, EPOLLIN);
    }
    return g;
}

static struct gateway_end *gateway_of(const struct control *c)
{
    if (!c->gateway)
        BUG("a worker's end of control is used as the gateway's");
    return c->gateway;
}

static struct peer *peer_of(const struct control *c, int rank)
{
    struct gateway_end *g = gateway_of(c);
    if (rank < 1 || rank >= g->topology.world)
        BUG("rank %d of %d", rank, g->topology.world);
    return &g->peers[rank];
}

int control_fd(const struct control *c)
{
    return gateway_of(c)->epoll_fd;
}

void control_set_timeout_ms(struct control *c, int timeout_ms)
{
    gateway_of(c)->timeout_ms = timeout_ms;
}

uint64_t control_queued_bytes(const struct control *c, int rank)
{
    return peer_of(c, rank)->n_queued;
}

/* ---- writing ---- */

static void pop_first(struct peer *p)
{
    struct outgoing *o = p->first;
    p->first = o->next;
    if (!p->first)
        p->last = &p->first;
    p->n_first_sent = 0;
    message_unref(o->m);
    free(o);
}

static void drop_queue(struct peer *p)
{
    while (p->first)
        pop_first(p);
    p->n_queued = 0;
}

/* What the socket takes of the first message's frame: bytes, or -1 with errno. */
static ssize_t send_first(struct peer *p)
{
    struct message *m = p->first->m;
    uint8_t header[FRAME_HEADER_BYTES];
    struct iovec iov[2];
    struct msghdr msg = {.msg_iov = iov};
    uint64_t n_payload_sent = 0;
    frame_header_encode(header, m->type, m->n_bytes);
    if (p->n_first_sent < FRAME_HEADER_BYTES)
        iov[msg.msg_iovlen++] =
            (struct iovec){header + p->n_first_sent, FRAME_HEADER_BYTES - (size_t)p->n_first_sent};
    else
        n_payload_sent = p->n_first_sent - FRAME_HEADER_BYTES;
    if (n_payload_sent < m->n_bytes)
        iov[msg.msg_iovlen++] =
            (struct iovec){m->payload + n_payload_sent, (size_t)(m->n_bytes - n_payload_sent)};
    return sendmsg(p->fd, &msg, MSG_NOSIGNAL);
}

/* Until the queue is empty or the socket full; -1 when the connection is broken. */
static int flush(struct gateway_end *g, struct peer *p)
{
    while (p->first) {
        ssize_t n = send_first(p);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            break;
        if (n < 0)
            return -1;
        p->n_first_sent += (uint64_t)n;
        p->n_queued -= (uint64_t)n;
        if (p->ping == PING_QUEUED)
            p->alive_ms = control_now_ms();
        if (p->n_first_sent < FRAME_HEADER_BYTES + p->first->m->n_bytes)
            continue;
        if (p->first->m->type == CONTROL_PING)
            p->ping = PING_SENT;
        pop_first(p);
    }
    int wants_out = p->first != NULL;
    if (wants_out != p->polls_out)
        epoll_set(g, EPOLL_CTL_MOD, p->fd, p->rank, EPOLLIN | (wants_out ? EPOLLOUT : 0));
    p->polls_out = wants_out;
    return 0;
}

static void enqueue(struct gateway_end *g, struct peer *p, struct message *m)
{
    int was_empty = !p->first;
    struct outgoing *o = xcalloc(1, sizeof(*o));
    o->m = m;
    *p->last = o;
    p->last = &o->next;
    p->n_queued += FRAME_HEADER_BYTES + m->n_bytes;
    if (was_empty && flush(g, p))
        drop_queue(p); /* reading it will tell that the connection is broken */
}

void control_send(struct control *c, int rank, struct message *m)
{
    struct peer *p = peer_of(c, rank);
    if (m->type == CONTROL_NONE || m->type >= CONTROL_LOST)
        BUG("message of type %d", (int)m->type);
    if (p->state == PEER_GONE) {
        message_unref(m);
        return;
    }
    if (m->type == CONTROL_STOP)
        p->state = PEER_STOPPING;
    enqueue(gateway_of(c), p, m);
}

/* ---- losing ---- */

static void close_peer(struct peer *p)
{
    close(p->fd); /* and out of the epoll */
    drop_queue(p);
    message_unref(p->in);
    p->in = NULL;
    p->state = PEER_GONE;
}

/* What the caller is told: NULL for a peer that was asked to stop. */
static struct message *lose(struct gateway_end *g, struct peer *p, const char *why)
{
    enum peer_state was = p->state;
    char name[64];
    close_peer(p);
    if (was == PEER_STOPPING)
        return NULL;
    log_error("control", "rank %d (%s) is lost: %s", p->rank,
              topology_describe(&g->topology, p->rank, name, sizeof(name)), why);
    struct message *m = message_new(CONTROL_LOST, 0);
    m->rank = p->rank;
    return m;
}

static struct message *lose_error(struct gateway_end *g, struct peer *p)
{
    return lose(g, p, errno ? strerror(errno) : "it closed the connection");
}

/* ---- reading ---- */

enum reading { READING_MORE, READING_WHOLE, READING_BROKEN };

/* Says so, once for each new longest wait, when a rank was nearly given up. */
static void sign_of_life(struct gateway_end *g, struct peer *p)
{
    int64_t now_ms = control_now_ms(), waited_ms = p->ping == PING_NONE ? 0 : now_ms - p->alive_ms;
    p->alive_ms = now_ms;
    if (waited_ms <= g->timeout_ms / 2 || waited_ms <= p->longest_ms)
        return;
    p->longest_ms = waited_ms;
    log_warn("control", "rank %d answered after %lld ms; after %d it is taken for lost", p->rank,
             (long long)waited_ms, g->timeout_ms);
}

/* What the socket gave, 0 when it has nothing now, -1 when broken (errno 0: closed). */
static ssize_t read_some(struct gateway_end *g, struct peer *p, void *to, uint64_t n_bytes)
{
    ssize_t n;
    do
        n = recv(p->fd, to, (size_t)n_bytes, 0);
    while (n < 0 && errno == EINTR);
    if (n > 0) {
        sign_of_life(g, p);
        return n;
    }
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return 0;
    if (n == 0)
        errno = 0;
    return -1;
}

static void begin_message(struct peer *p)
{
    struct frame_header h;
    if (frame_header_decode(&h, p->header))
        die("rank %d sent something that is no frame", p->rank);
    p->in = message_new((enum control_type)h.type, h.n_bytes);
    p->in->rank = p->rank;
    p->n_in = 0;
}

static enum reading read_message(struct gateway_end *g, struct peer *p)
{
    while (p->n_header < FRAME_HEADER_BYTES) {
        ssize_t n = read_some(g, p, p->header + p->n_header, FRAME_HEADER_BYTES - p->n_header);
        if (n <= 0)
            return n < 0 ? READING_BROKEN : READING_MORE;
        p->n_header += (size_t)n;
        if (p->n_header == FRAME_HEADER_BYTES)
            begin_message(p);
    }
    while (p->n_in < p->in->n_bytes) {
        ssize_t n = read_some(g, p, p->in->payload + p->n_in, p->in->n_bytes - p->n_in);
        if (n <= 0)
            return n < 0 ? READING_BROKEN : READING_MORE;
        p->n_in += (uint64_t)n;
    }
    return READING_WHOLE;
}

static struct message *take_message(struct peer *p)
{
    struct message *m = p->in;
    p->in = NULL;
    p->n_header = 0;
    if (m->type != CONTROL_PONG)
        return m;
    p->ping = PING_NONE;
    message_unref(m);
    return NULL;
}

static struct message *handle_peer(struct gateway_end *g, struct peer *p, uint32_t events)
{
    if ((events & EPOLLOUT) && flush(g, p))
        return lose_error(g, p);
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return NULL;
    switch (read_message(g, p)) {
    case READING_WHOLE:
        return take_message(p);
    case READING_BROKEN:
        return lose_error(g, p);
    case READING_MORE:
        break;
    }
    return NULL;
}

/* ---- liveness ---- */

static struct message *check_peer(struct gateway_end *g, struct peer *p, int64_t now_ms)
{
    char why[64];
    if (p->state == PEER_GONE)
        return NULL;
    if (p->ping == PING_NONE && now_ms >= p->next_ping_ms) {
        p->ping = PING_QUEUED;
        p->alive_ms = now_ms;
        p->next_ping_ms = now_ms + PING_MS;
        enqueue(g, p, message_new(CONTROL_PING, 0));
    }
    if (p->ping == PING_NONE || now_ms - p->alive_ms <= g->timeout_ms)
        return NULL;
    snprintf(why, sizeof(why), "no answer for %lld ms", (long long)(now_ms - p->alive_ms));
    return lose(g, p, why);
}

/* Everything that had come is read by now, so silence is silence; unless it was this process that
 * slept, which is told from the time since the last call: of that, SLEPT_MS count. */
static struct message *check_peers(struct gateway_end *g)
{
    int64_t now_ms = control_now_ms(), slept_ms = now_ms - g->last_next_ms;
    g->last_next_ms = now_ms;
    for (int r = 1; r < g->topology.world && slept_ms > SLEPT_MS; r++) {
        int64_t alive_ms = g->peers[r].alive_ms + slept_ms - SLEPT_MS;
        g->peers[r].alive_ms = alive_ms < now_ms ? alive_ms : now_ms;
    }
    for (int r = 1; r < g->topology.world; r++) {
        struct message *m = check_peer(g, &g->peers[r], now_ms);
        if (m)
            return m;
    }
    return NULL;
}

struct message *control_next(struct control *c)
{
    struct gateway_end *g = gateway_of(c);
    for (;;) {
        struct epoll_event e;
        struct message *m;
        uint64_t n_ticks;
        int n = epoll_wait(g->epoll_fd, &e, 1, 0);
        if (n < 0 && errno != EINTR)
            die("epoll_wait: %s", strerror(errno));
        if (n == 0)
            return check_peers(g);
        if (n < 0)
            continue;
        if (e.data.u32 == 0) {
            if (read(g->timer_fd, &n_ticks, sizeof(n_ticks)) < 0 && errno != EAGAIN)
                die("timerfd: %s", strerror(errno));
            continue;
        }
        m = handle_peer(g, &g->peers[e.data.u32], e.events);
        if (m)
            return m;
    }
}

/* ---- closing ---- */

/* Sends the rest, says so to the peer, and reads until it has closed too: closing with unread bytes
 * would reset the connection and lose what is on its way. */
static void drain_peer(struct gateway_end *g, struct peer *p, int64_t deadline_ms)
{
    uint8_t unread[4096];
    int shut = 0;
    for (;;) {
        int64_t left_ms = deadline_ms - control_now_ms();
        if (flush(g, p) || left_ms <= 0)
            return;
        if (!p->first && !shut)
            shut = shutdown(p->fd, SHUT_WR) == 0;
        struct pollfd polled = {.fd = p->fd, .events = POLLIN | (p->first ? POLLOUT : 0)};
        if (poll(&polled, 1, (int)left_ms) < 0 && errno != EINTR)
            return;
        if ((polled.revents & ~POLLOUT) && read_some(g, p, unread, sizeof(unread)) < 0)
            return;
    }
}

void gateway_end_close(struct gateway_end *g)
{
    int64_t deadline_ms = control_now_ms() + CONTROL_CLOSE_MS;
    for (int r = 1; r < g->topology.world; r++) {
        if (g->peers[r].state == PEER_GONE)
            continue;
        drain_peer(g, &g->peers[r], deadline_ms);
        close_peer(&g->peers[r]);
    }
    close(g->timer_fd);
    close(g->epoll_fd);
    free(g->peers);
    free(g);
}
