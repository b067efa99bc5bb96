/*
 * The library where no daemon answers: bad options, a port where nobody listens, a listener that
 * never speaks (deadline, cancel from another thread, a queue closed with calls in flight).
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "client/internvl_client.h"
#include "client/rpc.h"

/* A socket that accepts into its backlog and says nothing. */
struct silent {
    int fd;
    char address[32];
};

static void silent_open(struct silent *s, int listening)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof(a);
    s->fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(s->fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(getsockname(s->fd, (struct sockaddr *)&a, &n), 0);
    if (listening)
        assert_int_equal(listen(s->fd, 16), 0);
    snprintf(s->address, sizeof(s->address), "127.0.0.1:%d", ntohs(a.sin_port));
}

static struct internvl_client *connect_to(const struct silent *s)
{
    struct internvl_options o = {.address = s->address, .token = "secret"};
    struct internvl_client *c = internvl_connect(&o, NULL);
    assert_non_null(c);
    return c;
}

static int no_event(void *arg, const struct internvl_event *e)
{
    (void)arg;
    (void)e;
    fail_msg("an event from nobody");
    return 0;
}

static void test_options(void **state)
{
    (void)state;
    struct internvl_error err = {0};
    struct internvl_options o = {.address = ""};
    assert_null(internvl_connect(&o, &err));
    assert_int_equal(err.code, INTERNVL_INVALID_ARGUMENT);
    o.address = "127.0.0.1:1";
    o.token = "two words";
    assert_null(internvl_connect(&o, &err));
    assert_int_equal(err.code, INTERNVL_INVALID_ARGUMENT);
    assert_null(internvl_connect(&o, NULL));
    internvl_close(NULL);
    internvl_queue_close(NULL);
    internvl_cancel_free(NULL);
}

static void test_error_is_cut_between_characters(void **state)
{
    (void)state;
    struct internvl_error err;
    char text[700];
    for (int shift = 0; shift < 4; shift++) {
        memset(text, 'x', sizeof(text));
        for (size_t i = (size_t)shift; i + 3 < sizeof(text); i += 3)
            memcpy(text + i, "\xe4\xbd\xa0", 3);
        text[sizeof(text) - 1] = '\0';
        assert_int_equal(rpc_error(&err, INTERNVL_INTERNAL, "%s", text), -1);
        size_t n = strlen(err.msg);
        assert_true(n >= sizeof(err.msg) - 4 && (n - (size_t)shift) % 3 == 0);
    }
    assert_string_equal(internvl_code_name(INTERNVL_UNAUTHENTICATED), "UNAUTHENTICATED");
    assert_string_equal(internvl_code_name(-1), "UNKNOWN");
    assert_string_equal(internvl_code_name(17), "UNKNOWN");
}

static void test_refused(void **state)
{
    (void)state;
    struct silent s;
    silent_open(&s, 0);
    struct internvl_client *c = connect_to(&s);
    struct internvl_generate_request r = {0};
    struct internvl_error err = {0};
    assert_int_equal(internvl_generate(c, &r, NULL, no_event, NULL, &err), -1);
    assert_int_equal(err.code, INTERNVL_UNAVAILABLE);
    assert_true(err.msg[0] != '\0');
    struct internvl_model model;
    assert_int_equal(internvl_get_model(c, NULL, &model, NULL), -1);
    internvl_model_release(&model);
    internvl_close(c);
    close(s.fd);
}

static void test_deadline(void **state)
{
    (void)state;
    struct silent s;
    silent_open(&s, 1);
    struct internvl_client *c = connect_to(&s);
    struct internvl_call_options o = {.timeout_ms = 50};
    struct internvl_forward_request r = {0};
    struct internvl_forward_result out;
    struct internvl_error err = {0};
    assert_int_equal(internvl_forward(c, &r, &o, &out, &err), -1);
    assert_int_equal(err.code, INTERNVL_DEADLINE_EXCEEDED);
    o.timeout_ms = -1;
    assert_int_equal(internvl_forward(c, &r, &o, &out, &err), -1);
    assert_int_equal(err.code, INTERNVL_INVALID_ARGUMENT);
    internvl_close(c);
    close(s.fd);
}

static void *cancel_soon(void *handle)
{
    usleep(50 * 1000);
    internvl_cancel(handle);
    return NULL;
}

static void test_cancel_from_another_thread(void **state)
{
    (void)state;
    struct silent s;
    silent_open(&s, 1);
    struct internvl_client *c = connect_to(&s);
    struct internvl_cancel *handle = internvl_cancel_new();
    struct internvl_call_options o = {.cancel = handle};
    struct internvl_generate_request r = {0};
    struct internvl_error err = {0};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, cancel_soon, handle), 0);
    assert_int_equal(internvl_generate(c, &r, &o, no_event, NULL, &err), -1);
    assert_int_equal(err.code, INTERNVL_CANCELLED);
    pthread_join(thread, NULL);
    /* It stays cancelled: the next call ends at once. */
    assert_int_equal(internvl_generate(c, &r, &o, no_event, NULL, &err), -1);
    assert_int_equal(err.code, INTERNVL_CANCELLED);
    internvl_cancel_free(handle);
    internvl_close(c);
    close(s.fd);
}

struct ends {
    struct internvl_queue *queue;
    int n, n_refused, code;
};

static void count_end(void *arg, const struct internvl_error *status)
{
    struct ends *e = arg;
    struct internvl_generate_request r = {0};
    struct internvl_error err;
    e->n++;
    e->code = status->code;
    /* A queue that is being closed takes nothing new. */
    if (internvl_generate_start(e->queue, &r, NULL, no_event, count_end, e, &err))
        e->n_refused++;
}

static void test_queue_closed_with_calls_in_flight(void **state)
{
    (void)state;
    struct silent s;
    silent_open(&s, 1);
    struct internvl_client *c = connect_to(&s);
    struct ends ends = {.queue = internvl_queue_open(c)};
    struct internvl_generate_request r = {0};
    assert_int_equal(internvl_queue_poll(ends.queue, 0), 0);
    for (int i = 0; i < 8; i++)
        assert_int_equal(
            internvl_generate_start(ends.queue, &r, NULL, no_event, count_end, &ends, NULL), 0);
    assert_int_equal(internvl_queue_poll(ends.queue, 20), 8);
    internvl_queue_close(ends.queue);
    assert_int_equal(ends.n, 8);
    assert_int_equal(ends.n_refused, 8);
    assert_int_equal(ends.code, INTERNVL_CANCELLED);
    internvl_close(c);
    close(s.fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_error_is_cut_between_characters),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_deadline),
        cmocka_unit_test(test_cancel_from_another_thread),
        cmocka_unit_test(test_queue_closed_with_calls_in_flight),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
