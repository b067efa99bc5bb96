/* rpc: streams that are answered once, read message by message; a silent client, the end of all
 * streams. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "client/rpc.h"
#include "daemon/gateway/rpc.h"
#include "grpc/health/v1/health.pb-c.h"

#define METHOD "/test.Test/Stream"

/* ---- the server: counts messages, answers at the end ---- */

static atomic_int n_messages, n_ended;

static void on_message(void *arg, struct rpc_call *c)
{
    struct arena a = {0};
    struct error err = {0};

    (void)arg;
    assert_non_null(
        rpc_take_message(c, &grpc__health__v1__health_check_request__descriptor, 16, &a, &err));
    arena_release(&a);
    atomic_fetch_add(&n_messages, 1);
    rpc_read_next(c);
}

static void on_ended(void *arg, struct rpc_call *c)
{
    Grpc__Health__V1__HealthCheckResponse answer = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;

    (void)arg;
    atomic_fetch_add(&n_ended, 1);
    answer.status = atomic_load(&n_messages);
    rpc_finish(c, NULL, &answer.base);
}

static const struct rpc_method methods[] = {{METHOD, 1, 1, on_message, on_ended}};

static struct rpc_server *open_server(void)
{
    struct rpc_options o = {.listen = "127.0.0.1:0",
                            .max_message_bytes = 1 << 16,
                            .max_connections = 8,
                            .max_open_calls = 8};
    struct error err = {0};
    struct rpc_server *s = rpc_server_open(&o, methods, 1, NULL, &err);

    assert_non_null(s);
    atomic_store(&n_messages, 0);
    atomic_store(&n_ended, 0);
    return s;
}

/* ---- the client: sends n messages, then waits to be let go ---- */

struct sender {
    const char *address;
    int n_left;
    atomic_int is_free;
    int status, answer; // of the call, and of the message that came
    Grpc__Health__V1__HealthCheckRequest request;
};

static const ProtobufCMessage *next(void *arg)
{
    struct sender *s = arg;

    if (s->n_left-- > 0)
        return &s->request.base;
    while (!atomic_load(&s->is_free))
        poll(NULL, 0, 1);
    return NULL;
}

static int take_answer(void *arg, const uint8_t *bytes, size_t n_bytes, struct internvl_error *err)
{
    struct sender *s = arg;
    Grpc__Health__V1__HealthCheckResponse *m =
        grpc__health__v1__health_check_response__unpack(NULL, n_bytes, bytes);

    (void)err;
    s->answer = (int)m->status;
    grpc__health__v1__health_check_response__free_unpacked(m, NULL);
    return 0;
}

static void *send_all(void *arg)
{
    struct sender *s = arg;
    struct internvl_error err = {0};
    struct rpc_channel *c = rpc_channel_open(s->address, NULL, 0, &err);

    grpc__health__v1__health_check_request__init(&s->request);
    rpc_run_stream(c, METHOD, &s->request.base, next, NULL, take_answer, s, &err);
    s->status = err.code;
    rpc_channel_close(c);
    return NULL;
}

static void wait_messages(int n)
{
    while (atomic_load(&n_messages) < n)
        poll(NULL, 0, 1);
}

static void test_answered_once(void **state)
{
    (void)state;
    struct rpc_server *s = open_server();
    struct sender a = {.address = rpc_server_address(s), .n_left = 20, .is_free = 1};

    send_all(&a);
    assert_int_equal(a.status, INTERNVL_OK);
    assert_int_equal(a.answer, 21);
    assert_int_equal(atomic_load(&n_ended), 1);
    rpc_server_close(s, 1000);
}

/* Begins a call that goes silent after three messages; `end` it until it is over. */
static int end_silent(struct rpc_server *s, void (*end)(struct rpc_server *s))
{
    struct sender a = {.address = rpc_server_address(s), .n_left = 2};
    pthread_t thread;

    assert_int_equal(pthread_create(&thread, NULL, send_all, &a), 0);
    wait_messages(3);
    rpc_server_end_stalled(s, 100000); // not silent for so long
    assert_int_equal(rpc_server_open_calls(s), 1);
    while (rpc_server_open_calls(s) > 0) {
        end(s);
        poll(NULL, 0, 1);
    }
    atomic_store(&a.is_free, 1);
    pthread_join(thread, NULL);
    assert_int_equal(atomic_load(&n_ended), 0);
    assert_int_equal(a.answer, 0);
    return a.status;
}

static void end_stalled(struct rpc_server *s)
{
    rpc_server_end_stalled(s, 0);
}

static void test_silent(void **state)
{
    (void)state;
    struct rpc_server *s = open_server();

    assert_int_equal(end_silent(s, end_stalled), INTERNVL_DEADLINE_EXCEEDED);
    rpc_server_close(s, 1000);
}

static void test_end_streams(void **state)
{
    (void)state;
    struct rpc_server *s = open_server();
    struct sender late = {.address = rpc_server_address(s), .is_free = 1};

    assert_int_equal(end_silent(s, rpc_server_end_streams), INTERNVL_UNAVAILABLE);
    send_all(&late); // one that comes later
    assert_int_equal(late.status, INTERNVL_UNAVAILABLE);
    rpc_server_close(s, 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answered_once),
        cmocka_unit_test(test_silent),
        cmocka_unit_test(test_end_streams),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
