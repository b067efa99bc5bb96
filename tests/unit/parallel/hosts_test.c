/*
 * Ranks that fit together and ranks that do not: hosts_check() on made-up jobs.
 */
#include "parallel/hosts.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define WORLD 6 /* V=1, T=2, P=2 */

static struct topology topology;

/* Ranks 0 … 3 on "a", 4 and 5 on "b". */
static void make_job(struct rank_host *all)
{
    struct layout l = {1, 2, 2};
    assert_int_equal(topology_init(&topology, 0, WORLD, &l, NULL), 0);
    memset(all, 0, WORLD * sizeof(*all));
    for (int r = 0; r < WORLD; r++) {
        strcpy(all[r].host, r < 4 ? "a" : "b");
        strcpy(all[r].settings, "--dtype=bfloat16 --max-num-seqs=64 KV-pages=100");
        all[r].checkpoint_hash = 7;
        all[r].n_cores = 8;
        all[r].n_threads = r > 0;
        all[r].n_devices = 3;
        strcpy(all[r].device_name, "large");
        all[r].device_use = r > 0 ? DEVICE_USE_OWN : DEVICE_USE_NONE;
    }
}

static void assert_refused(const struct rank_host *all, const char *sentence)
{
    struct error err = {0};
    assert_int_equal(hosts_check(all, WORLD, &err), -1);
    assert_string_equal(err.msg, sentence);
}

static void fits(void **state)
{
    struct rank_host all[WORLD];
    struct error err = {0};
    (void)state;
    make_job(all);
    assert_int_equal(hosts_check(all, WORLD, &err), 0);
    all[5].n_threads = 3; /* may differ */
    assert_int_equal(hosts_check(all, WORLD, &err), 0);
}

static void one_rank_fails(void **state)
{
    struct rank_host all[WORLD];
    (void)state;
    make_job(all);
    error_set(&all[4].error, ERROR_NOT_FOUND, "config.json is not there");
    error_set(&all[5].error, ERROR_NOT_FOUND, "config.json is not there");
    assert_refused(all, "rank 4 on b: config.json is not there");
    for (int r = 0; r < WORLD; r++)
        all[r].error = all[4].error;
    assert_refused(all, "config.json is not there");
}

static void settings_differ(void **state)
{
    struct rank_host all[WORLD];
    (void)state;
    make_job(all);
    strcpy(all[4].settings, "--dtype=bfloat16 --max-num-seqs=6 KV-pages=100");
    assert_refused(all, "rank 4 on b has --max-num-seqs=6, rank 0 on a has --max-num-seqs=64");
    strcpy(all[4].settings, "--dtype=bfloat16 --max-num-seqs=64 KV-pages=1000");
    assert_refused(all, "rank 4 on b has KV-pages=1000, rank 0 on a has KV-pages=100");
}

static void checkpoints_differ(void **state)
{
    struct rank_host all[WORLD];
    (void)state;
    make_job(all);
    all[5].checkpoint_hash = 8;
    assert_refused(all, "rank 5 on b has another checkpoint than rank 0 on a (config.json or the "
                        "sizes of its safetensors files differ)");
}

static void too_few_devices(void **state)
{
    struct rank_host all[WORLD];
    (void)state;
    make_job(all);
    all[4].n_devices = all[5].n_devices = 1;
    assert_refused(all, "2 ranks on b need a GPU each and this build finds 1 there "
                        "(--vision-share-gpu: vision ranks share)");
}

static void devices_of_several_kinds(void **state)
{
    struct rank_host all[WORLD];
    struct error err = {0};
    (void)state;
    make_job(all);
    strcpy(all[0].device_name, "small"); /* the gateway's is not used */
    assert_int_equal(hosts_check(all, WORLD, &err), 0);
    strcpy(all[4].device_name, "small");
    assert_refused(all, "rank 4 on b has a GPU of another kind (small) than rank 1 on a (large)");
}

static void devices_are_dealt_out(void **state)
{
    static const int own[WORLD] = {-1, 0, 1, 2, 0, 1}, shared[WORLD] = {-1, 0, 0, 1, 0, 1};
    struct rank_host all[WORLD];
    struct error err = {0};
    (void)state;
    make_job(all);
    for (int r = 0; r < WORLD; r++)
        assert_int_equal(hosts_device(all, WORLD, r), own[r]);
    all[1].device_use = DEVICE_USE_SHARED; /* the vision rank, with the first shard */
    for (int r = 0; r < WORLD; r++)
        assert_int_equal(hosts_device(all, WORLD, r), shared[r]);
    for (int r = 0; r < 4; r++)
        all[r].n_devices = 2;
    assert_int_equal(hosts_check(all, WORLD, &err), 0);
    for (int r = 1; r < 4; r++) { /* nobody there has one of its own */
        all[r].device_use = DEVICE_USE_SHARED;
        assert_int_equal(hosts_check(all, WORLD, &err), 0);
    }
    assert_int_equal(hosts_device(all, WORLD, 3), 0);
    all[1].n_devices = 0;
    assert_refused(all, "rank 1 shares a GPU of a and this build finds none there");
}

static void cores_are_shared(void **state)
{
    static const int expected[WORLD] = {1, 3, 3, 3, 2, 2};
    static const int first[WORLD] = {0, 1, 1, 1, 4, 4}, place[WORLD] = {0, 0, 1, 2, 0, 1};
    struct rank_host all[WORLD];
    int index;
    (void)state;
    make_job(all);
    for (int r = 0; r < WORLD; r++)
        assert_int_equal(hosts_n_sharing_cores(all, WORLD, r), expected[r]);
    for (int r = 0; r < WORLD; r++) {
        assert_int_equal(hosts_first_sharing_cores(all, r, &index), first[r]);
        assert_int_equal(index, place[r]);
    }
    all[3].cores_hash = 1; /* bound to cores of its own */
    assert_int_equal(hosts_n_sharing_cores(all, WORLD, 2), 2);
    assert_int_equal(hosts_n_sharing_cores(all, WORLD, 3), 1);
    assert_int_equal(hosts_n_sharing_cores(all, WORLD, 4), 2);
}

static void prints_a_line_a_rank(void **state)
{
    struct rank_host all[WORLD];
    char text[4096];
    (void)state;
    make_job(all);
    FILE *f = fmemopen(text, sizeof(text), "w");
    hosts_print(f, all, &topology);
    fclose(f);
    assert_non_null(strstr(text, "\n   0  gateway                     a      1 of 4 "));
    assert_non_null(strstr(text, "\n   5  language stage 1 shard 1    b      2 of 2 "));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fits),
        cmocka_unit_test(one_rank_fails),
        cmocka_unit_test(settings_differ),
        cmocka_unit_test(checkpoints_differ),
        cmocka_unit_test(too_few_devices),
        cmocka_unit_test(devices_of_several_kinds),
        cmocka_unit_test(devices_are_dealt_out),
        cmocka_unit_test(cores_are_shared),
        cmocka_unit_test(prints_a_line_a_rank),
    };
    return cmocka_run_group_tests_name("hosts", tests, NULL, NULL);
}
