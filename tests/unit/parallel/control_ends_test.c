/*
 * Both ends of control over loopback in one process, without MPI: messages, back pressure,
 * liveness, stopping. Rank 1 is a worker end with its thread; rank 2 is a bare socket, which can be
 * silent, close, or talk nonsense.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/control_wire.h"

#define WORLD 3
#define BIG ((uint64_t)24 << 20)
#define N_LATE 3
#define LATE_MS 600 // well past half of what is allowed

struct pair {
    struct control gateway, worker;
    int bare_fd; // rank 2
};

static void tcp_pair(int fds[2])
{
    struct control_address a = {0};
    int listen_fd = control_listen(&a, NULL, 1);
    fds[1] = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(connect(fds[1], (struct sockaddr *)&a.at[0], a.n_bytes[0]), 0);
    struct pollfd p = {.fd = listen_fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, -1), 1);
    fds[0] = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK);
    assert_true(fds[0] >= 0);
    close(listen_fd);
}

static void open_pair(struct pair *p)
{
    const struct topology t = {.rank = 0, .world = WORLD, .layout = {1, 1, 1}};
    int one[2], two[2];
    tcp_pair(one);
    tcp_pair(two);
    const int fds[WORLD] = {-1, one[0], two[0]};
    *p = (struct pair){.bare_fd = two[1]};
    p->gateway.gateway = gateway_end_open(&t, fds);
    p->worker.worker = worker_end_open(one[1]);
}

static struct message *wait_next(struct control *c)
{
    for (;;) {
        struct message *m = control_next(c);
        if (m)
            return m;
        struct pollfd p = {.fd = control_fd(c), .events = POLLIN};
        poll(&p, 1, 500);
    }
}

/* Both ranks are told to stop; then both real ends close, the worker from a thread, because each
 * waits for the other. */
static void *close_worker(void *arg)
{
    worker_end_close(arg);
    return NULL;
}

static void close_pair(struct pair *p)
{
    pthread_t thread;
    for (int r = 1; r < WORLD; r++)
        control_send(&p->gateway, r, message_new(CONTROL_STOP, 0));
    close(p->bare_fd);
    assert_int_equal(pthread_create(&thread, NULL, close_worker, p->worker.worker), 0);
    gateway_end_close(p->gateway.gateway);
    pthread_join(thread, NULL);
}

static struct message *numbered(enum control_type type, uint64_t n_bytes, uint8_t number)
{
    struct message *m = message_new(type, n_bytes);
    for (uint64_t i = 0; i < n_bytes; i++)
        m->payload[i] = (uint8_t)(i * 7 + number);
    return m;
}

static void check_numbered(struct message *m, enum control_type type, uint64_t n_bytes,
                           uint8_t number)
{
    struct message *expected = numbered(type, n_bytes, number);
    assert_int_equal(m->type, type);
    assert_int_equal(m->n_bytes, n_bytes);
    assert_memory_equal(m->payload, expected->payload, n_bytes);
    message_unref(expected);
    message_unref(m);
}

static void test_messages_in_order(void **state)
{
    (void)state;
    static const uint64_t sizes[] = {0, 1, 7, 4096, 100000, 0, 3};
    struct pair p;
    open_pair(&p);
    for (uint8_t i = 0; i < 7; i++)
        control_send(&p.gateway, 1, numbered(CONTROL_BATCH, sizes[i], i));
    for (uint8_t i = 0; i < 7; i++)
        check_numbered(control_recv(&p.worker), CONTROL_BATCH, sizes[i], i);
    for (uint8_t i = 0; i < 7; i++)
        control_reply(&p.worker, numbered(CONTROL_RESULT, sizes[i], i));
    for (uint8_t i = 0; i < 7; i++) {
        struct message *m = wait_next(&p.gateway);
        assert_int_equal(m->rank, 1);
        check_numbered(m, CONTROL_RESULT, sizes[i], i);
    }
    assert_null(control_next(&p.gateway));
    close_pair(&p);
}

/* One message to both, without a copy; the sender keeps a reference of its own. */
static void test_one_message_to_many(void **state)
{
    (void)state;
    struct pair p;
    uint8_t frame[FRAME_HEADER_BYTES + 5];
    open_pair(&p);
    struct message *m = numbered(CONTROL_BATCH, 5, 1);
    control_send(&p.gateway, 1, message_ref(m));
    control_send(&p.gateway, 2, message_ref(m));
    check_numbered(control_recv(&p.worker), CONTROL_BATCH, 5, 1);
    assert_int_equal(recv(p.bare_fd, frame, sizeof(frame), MSG_WAITALL), sizeof(frame));
    assert_memory_equal(frame + FRAME_HEADER_BYTES, m->payload, 5);
    assert_int_equal(m->n_refs, 1);
    message_unref(m);
    close_pair(&p);
}

static void *echo(void *arg)
{
    struct control *c = arg;
    for (int i = 0; i < 3; i++) {
        struct message *m = control_recv(c);
        m->type = CONTROL_FEATURES;
        control_reply(c, m);
    }
    return NULL;
}

/* Far more than the sockets hold, both directions at once. */
static void test_big_both_ways(void **state)
{
    (void)state;
    struct pair p;
    pthread_t thread;
    open_pair(&p);
    control_set_timeout_ms(&p.gateway, 60000); /* rank 2 answers no pings */
    assert_int_equal(pthread_create(&thread, NULL, echo, &p.worker), 0);
    for (uint8_t i = 0; i < 3; i++)
        control_send(&p.gateway, 1, numbered(CONTROL_TILES, BIG, i));
    for (uint8_t i = 0; i < 3; i++)
        check_numbered(wait_next(&p.gateway), CONTROL_FEATURES, BIG, i);
    assert_int_equal(control_queued_bytes(&p.gateway, 1), 0);
    pthread_join(thread, NULL);
    close_pair(&p);
}

/* A peer that reads nothing: sending returns at once, the rest is counted, and the peer is lost. */
static void test_peer_that_reads_nothing(void **state)
{
    (void)state;
    struct pair p;
    open_pair(&p);
    control_set_timeout_ms(&p.gateway, 300);
    control_send(&p.gateway, 2, message_new(CONTROL_TILES, 4 * BIG));
    assert_true(control_queued_bytes(&p.gateway, 2) > BIG);
    struct message *m = wait_next(&p.gateway);
    assert_int_equal(m->type, CONTROL_LOST);
    assert_int_equal(m->rank, 2);
    message_unref(m);
    assert_int_equal(control_queued_bytes(&p.gateway, 2), 0);
    close_pair(&p);
}

/* Rank 2 never answers pings; rank 1's main thread does nothing either, but its end answers. */
static void test_silent_peer_is_lost(void **state)
{
    (void)state;
    struct pair p;
    open_pair(&p);
    struct message *m = wait_next(&p.gateway);
    assert_int_equal(m->type, CONTROL_LOST);
    assert_int_equal(m->rank, 2);
    message_unref(m);
    for (int i = 0; i < 12; i++) { /* well past the timeout */
        const struct timespec quarter = {.tv_nsec = 250000000};
        assert_null(control_next(&p.gateway));
        nanosleep(&quarter, NULL);
    }
    control_send(&p.gateway, 2, message_new(CONTROL_BATCH, 10)); /* dropped */
    close_pair(&p);
}

/* A gateway that seldom gets a core: what it slept is no silence, or little of it, but rank 2 is
 * noticed in the end, and rank 1, which answers meanwhile, is not. */
static void test_silent_peer_of_a_slow_gateway_is_lost(void **state)
{
    (void)state;
    struct pair p;
    struct message *m = NULL;
    const struct timespec slept = {.tv_nsec = 700000000};
    int n = 0;
    open_pair(&p);
    for (; !m && n < 30; n++) {
        nanosleep(&slept, NULL);
        m = control_next(&p.gateway);
    }
    assert_in_range(n, 3, 29);
    assert_int_equal(m->type, CONTROL_LOST);
    assert_int_equal(m->rank, 2);
    message_unref(m);
    close_pair(&p);
}

/* Answers each ping, late. */
static void *answer_late(void *arg)
{
    const struct timespec late = {.tv_nsec = LATE_MS * 1000000};
    const int *fd = arg;
    uint8_t frame[FRAME_HEADER_BYTES];
    struct frame_header h;
    for (int i = 0; i < N_LATE; i++) {
        assert_int_equal(recv(*fd, frame, sizeof(frame), MSG_WAITALL), sizeof(frame));
        assert_int_equal(frame_header_decode(&h, frame), 0);
        assert_int_equal(h.type, CONTROL_PING);
        nanosleep(&late, NULL);
        frame_header_encode(frame, CONTROL_PONG, 0);
        assert_int_equal(send(*fd, frame, sizeof(frame), 0), sizeof(frame));
    }
    return NULL;
}

/* As those of a host where cores are short. */
static void test_late_peer_is_not_lost(void **state)
{
    (void)state;
    struct pair p;
    pthread_t thread;
    open_pair(&p);
    assert_int_equal(pthread_create(&thread, NULL, answer_late, &p.bare_fd), 0);
    while (pthread_tryjoin_np(thread, NULL) != 0) {
        struct pollfd polled = {.fd = control_fd(&p.gateway), .events = POLLIN};
        poll(&polled, 1, 500);
        assert_null(control_next(&p.gateway));
    }
    close_pair(&p);
}

static void test_closed_peer_is_lost(void **state)
{
    (void)state;
    struct pair p;
    open_pair(&p);
    uint8_t frame[FRAME_HEADER_BYTES];
    frame_header_encode(frame, CONTROL_RESULT, 0);
    assert_int_equal(send(p.bare_fd, frame, sizeof(frame), 0), sizeof(frame));
    close(p.bare_fd);
    struct message *m = wait_next(&p.gateway); /* first what it had sent */
    assert_int_equal(m->type, CONTROL_RESULT);
    message_unref(m);
    m = wait_next(&p.gateway);
    assert_int_equal(m->type, CONTROL_LOST);
    assert_int_equal(m->rank, 2);
    message_unref(m);
    p.bare_fd = -1;
    close_pair(&p);
}

static void test_stopped_peer_is_not_lost(void **state)
{
    (void)state;
    struct pair p;
    open_pair(&p);
    control_send(&p.gateway, 2, message_new(CONTROL_STOP, 0));
    close(p.bare_fd);
    p.bare_fd = -1;
    for (int i = 0; i < 3; i++) {
        struct pollfd polled = {.fd = control_fd(&p.gateway), .events = POLLIN};
        poll(&polled, 1, 300);
        assert_null(control_next(&p.gateway));
    }
    close_pair(&p);
}

static void *close_gateway(void *arg)
{
    gateway_end_close(arg);
    return NULL;
}

/* What is queued at the time of closing still arrives, both ways. On a busy machine a message may
 * be through before this thread sees it queued: then another is sent. */
static void test_close_sends_what_is_queued(void **state)
{
    enum { MOST = 20 };
    (void)state;
    struct pair p;
    open_pair(&p);
    pthread_t thread;
    uint8_t n = 0;
    while (n < MOST && control_queued_bytes(&p.gateway, 1) == 0)
        control_send(&p.gateway, 1, numbered(CONTROL_BATCH, BIG, ++n));
    assert_true(control_queued_bytes(&p.gateway, 1) > 0);
    control_send(&p.gateway, 1, message_new(CONTROL_STOP, 0));
    close(p.bare_fd);
    assert_int_equal(pthread_create(&thread, NULL, close_gateway, p.gateway.gateway), 0);
    for (uint8_t i = 1; i <= n; i++)
        check_numbered(control_recv(&p.worker), CONTROL_BATCH, BIG, i);
    struct message *m = control_recv(&p.worker);
    assert_int_equal(m->type, CONTROL_STOP);
    message_unref(m);
    worker_end_close(p.worker.worker);
    pthread_join(thread, NULL);
}

static int child_status(void (*run)(struct pair *))
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        struct pair p;
        open_pair(&p);
        run(&p);
        _exit(99);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void lose_gateway(struct pair *p)
{
    shutdown(p->bare_fd, SHUT_RDWR);
    gateway_end_close(p->gateway.gateway); /* without CONTROL_STOP */
    control_recv(&p->worker);
}

static void talk_nonsense(struct pair *p)
{
    assert_true(send(p->bare_fd, "GET / HTTP/1.1\r\n\r\n", 18, 0) == 18);
    wait_next(&p->gateway);
}

static void test_deaths(void **state)
{
    (void)state;
    assert_int_equal(child_status(lose_gateway), 1);
    assert_int_equal(child_status(talk_nonsense), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_messages_in_order),
        cmocka_unit_test(test_one_message_to_many),
        cmocka_unit_test(test_big_both_ways),
        cmocka_unit_test(test_peer_that_reads_nothing),
        cmocka_unit_test(test_silent_peer_is_lost),
        cmocka_unit_test(test_silent_peer_of_a_slow_gateway_is_lost),
        cmocka_unit_test(test_late_peer_is_not_lost),
        cmocka_unit_test(test_closed_peer_is_lost),
        cmocka_unit_test(test_stopped_peer_is_not_lost),
        cmocka_unit_test(test_close_sends_what_is_queued),
        cmocka_unit_test(test_deaths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
