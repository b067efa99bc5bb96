/*
 * A worker's end of control: one blocking connection and a thread that receives.
 *
 * Owns the connection, the thread and the queue between it and the main thread. The thread answers
 * pings itself, so that a worker in the middle of a long step is known to be alive, and dies when
 * the gateway is gone or hangs, so that such a worker does not compute for nobody. Must not know
 * what a payload means.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/control_wire.h"

/* Silence is counted in looks, so that a pause of the whole machine is one look and no silence; but
 * a look that took longer, because others had the cores, counts for two. */
#define LOOK_MS 300
#define SILENCE_MAX_MS 1500

struct received {
    struct received *next;
    struct message *m;
};

struct worker_end {
    int fd;
    pthread_t thread;
    pthread_mutex_t write_lock; // one frame at a time

    pthread_mutex_t lock; // of what follows
    pthread_cond_t arrived;
    struct received *first, **last;
    int may_end; // CONTROL_STOP has come or we are closing: the gateway may close
};

static _Noreturn void die_gateway_gone(const char *why)
{
    die("rank 0 (the gateway) is gone: %s", why);
}

/* Takes n sent bytes off the front. */
static void advance(struct msghdr *msg, size_t n)
{
    while (msg->msg_iovlen > 0 && n >= msg->msg_iov->iov_len) {
        n -= msg->msg_iov->iov_len;
        msg->msg_iov++;
        msg->msg_iovlen--;
    }
    if (n > 0) {
        msg->msg_iov->iov_base = (uint8_t *)msg->msg_iov->iov_base + n;
        msg->msg_iov->iov_len -= n;
    }
}

/* 0, or -1 with errno. */
static int write_frame(struct worker_end *w, uint32_t type, uint8_t *payload, uint64_t n_bytes)
{
    uint8_t header[FRAME_HEADER_BYTES];
    struct iovec iov[2] = {{header, sizeof(header)}, {payload, (size_t)n_bytes}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n_bytes ? 2 : 1};
    ssize_t n = 0;
    frame_header_encode(header, type, n_bytes);
    pthread_mutex_lock(&w->write_lock);
    while (n >= 0 && msg.msg_iovlen > 0) {
        n = sendmsg(w->fd, &msg, MSG_NOSIGNAL);
        if (n >= 0)
            advance(&msg, (size_t)n);
        else if (errno == EINTR)
            n = 0;
    }
    pthread_mutex_unlock(&w->write_lock);
    return n < 0 ? -1 : 0;
}

/* ---- the receiving thread ---- */

static void gateway_closed(struct worker_end *w, const char *why)
{
    pthread_mutex_lock(&w->lock);
    int may_end = w->may_end;
    pthread_mutex_unlock(&w->lock);
    if (!may_end)
        die_gateway_gone(why);
}

/* Returns when there is something to read; the gateway's pings come several times a second. */
static void wait_for_gateway(struct worker_end *w)
{
    struct pollfd p = {.fd = w->fd, .events = POLLIN};
    int64_t silent_ms = 0;
    for (;;) {
        int64_t looked_ms = control_now_ms();
        int n = poll(&p, 1, LOOK_MS);
        looked_ms = control_now_ms() - looked_ms;
        if (n > 0)
            return;
        if (n < 0 && errno != EINTR)
            die("poll: %s", strerror(errno));
        silent_ms += looked_ms < 2 * LOOK_MS ? looked_ms : 2 * LOOK_MS;
        if (n == 0 && silent_ms >= SILENCE_MAX_MS) {
            gateway_closed(w, "it has been silent for 1.5 s");
            silent_ms = 0; /* it may end, and takes its time */
        }
    }
}

/* 1, or 0 when the gateway has closed and may. */
static int read_exactly(struct worker_end *w, uint8_t *to, uint64_t n_bytes)
{
    while (n_bytes > 0) {
        wait_for_gateway(w);
        ssize_t n = recv(w->fd, to, (size_t)n_bytes, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            gateway_closed(w, n < 0 ? strerror(errno) : "it closed the connection");
            return 0;
        }
        to += n;
        n_bytes -= (uint64_t)n;
    }
    return 1;
}

static void deliver(struct worker_end *w, struct message *m)
{
    struct received *r = xcalloc(1, sizeof(*r));
    r->m = m;
    pthread_mutex_lock(&w->lock);
    if (m->type == CONTROL_STOP)
        w->may_end = 1;
    *w->last = r;
    w->last = &r->next;
    pthread_cond_signal(&w->arrived);
    pthread_mutex_unlock(&w->lock);
}

static int receive_message(struct worker_end *w)
{
    uint8_t header[FRAME_HEADER_BYTES];
    struct frame_header h;
    if (!read_exactly(w, header, sizeof(header)))
        return 0;
    if (frame_header_decode(&h, header))
        die("the gateway sent something that is no frame");
    struct message *m = message_new((enum control_type)h.type, h.n_bytes);
    if (!read_exactly(w, m->payload, m->n_bytes)) {
        message_unref(m);
        return 0;
    }
    if (m->type != CONTROL_PING) {
        deliver(w, m);
        return 1;
    }
    message_unref(m);
    if (write_frame(w, CONTROL_PONG, NULL, 0))
        gateway_closed(w, strerror(errno));
    return 1;
}

static void *receive(void *arg)
{
    struct worker_end *w = arg;
    while (receive_message(w))
        ;
    return NULL;
}

/* ---- the main thread's side ---- */

struct worker_end *worker_end_open(int fd)
{
    struct worker_end *w = xcalloc(1, sizeof(*w));
    sigset_t all, old;
    w->fd = fd;
    w->last = &w->first;
    pthread_mutex_init(&w->write_lock, NULL);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->arrived, NULL);
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&w->thread, NULL, receive, w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        die("pthread_create: %s", strerror(rc));
    return w;
}

static struct worker_end *worker_of(struct control *c)
{
    if (!c->worker)
        BUG("the gateway's end of control is used as a worker's");
    return c->worker;
}

static struct message *pop_received(struct worker_end *w)
{
    struct received *r = w->first;
    struct message *m = r->m;
    w->first = r->next;
    if (!w->first)
        w->last = &w->first;
    free(r);
    return m;
}

struct message *control_recv(struct control *c)
{
    struct worker_end *w = worker_of(c);
    pthread_mutex_lock(&w->lock);
    while (!w->first)
        pthread_cond_wait(&w->arrived, &w->lock);
    struct message *m = pop_received(w);
    pthread_mutex_unlock(&w->lock);
    return m;
}

void control_reply(struct control *c, struct message *m)
{
    struct worker_end *w = worker_of(c);
    if (m->type == CONTROL_NONE || m->type >= CONTROL_LOST)
        BUG("message of type %d", (int)m->type);
    if (write_frame(w, m->type, m->payload, m->n_bytes))
        gateway_closed(w, strerror(errno));
    message_unref(m);
}

void worker_end_close(struct worker_end *w)
{
    struct timespec deadline;
    pthread_mutex_lock(&w->lock);
    w->may_end = 1;
    pthread_mutex_unlock(&w->lock);
    shutdown(w->fd, SHUT_WR);
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += CONTROL_CLOSE_MS / 1000;
    if (pthread_timedjoin_np(w->thread, NULL, &deadline)) {
        shutdown(w->fd, SHUT_RDWR); /* the gateway stays: wake the thread */
        pthread_join(w->thread, NULL);
    }
    close(w->fd);
    while (w->first)
        message_unref(pop_received(w));
    pthread_cond_destroy(&w->arrived);
    pthread_mutex_destroy(&w->lock);
    pthread_mutex_destroy(&w->write_lock);
    free(w);
}
