/*
 * Which cores are next to a GPU, on made-up machines; and the binding of this process's threads, on
 * two of its own cores that are called two sockets.
 */
#include "parallel/placement.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <hwloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define N_SOCKETS 2
#define XML_BYTES 16384

struct text {
    char bytes[XML_BYTES];
    size_t n;
};

static void __attribute__((format(printf, 2, 3))) add(struct text *t, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    t->n += (size_t)vsnprintf(t->bytes + t->n, sizeof(t->bytes) - t->n, fmt, args);
    va_end(args);
    assert_true(t->n < sizeof(t->bytes));
}

/* The attributes of an object over `cores`, on NUMA nodes of the mask `nodes`. */
static void add_sets(struct text *t, hwloc_const_bitmap_t cores, unsigned nodes)
{
    char set[64];
    hwloc_bitmap_snprintf(set, sizeof(set), cores);
    add(t, " cpuset=\"%s\" complete_cpuset=\"%s\" nodeset=\"0x%x\" complete_nodeset=\"0x%x\">\n",
        set, set, nodes, nodes);
}

/* A host bridge with four 3D controllers: 0000:10:00.0 … 13:00.0 on the first socket, 20 … 23 on
 * the second. */
static void add_gpus(struct text *t, int socket)
{
    unsigned first = 0x10u * (unsigned)(socket + 1);
    add(t,
        "<object type=\"Bridge\" bridge_type=\"0-1\" depth=\"0\" "
        "bridge_pci=\"0000:[%02x-%02x]\">\n",
        first, first + 3);
    for (unsigned i = first; i < first + 4; i++)
        add(t,
            "<object type=\"PCIDev\" pci_busid=\"0000:%02x:00.0\" "
            "pci_type=\"0302 [10de:2330] [10de:16c1] a1\" pci_link_speed=\"63.015385\"/>\n",
            i);
    add(t, "</object>\n");
}

/* Two sockets, each a NUMA node of the given cores, with eight GPUs in all; in hwloc's XML. */
static char *make_xml(hwloc_bitmap_t sockets[N_SOCKETS])
{
    static struct text t;
    hwloc_bitmap_t all = hwloc_bitmap_alloc(), one = hwloc_bitmap_alloc();
    int core;
    t.n = 0;
    hwloc_bitmap_or(all, sockets[0], sockets[1]);
    add(&t, "<?xml version=\"1.0\"?><!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n"
            "<topology version=\"2.0\">\n<object type=\"Machine\" os_index=\"0\"");
    char set[64];
    hwloc_bitmap_snprintf(set, sizeof(set), all);
    add(&t, " allowed_cpuset=\"%s\" allowed_nodeset=\"0x3\"", set);
    add_sets(&t, all, 3);
    for (int i = 0; i < N_SOCKETS; i++) {
        add(&t, "<object type=\"Package\" os_index=\"%d\"", i);
        add_sets(&t, sockets[i], 1u << i);
        add(&t, "<object type=\"NUMANode\" os_index=\"%d\" local_memory=\"1073741824\"", i);
        add_sets(&t, sockets[i], 1u << i);
        add(&t, "</object>\n");
        hwloc_bitmap_foreach_begin(core, sockets[i])
        {
            hwloc_bitmap_only(one, (unsigned)core);
            add(&t, "<object type=\"PU\" os_index=\"%d\"", core);
            add_sets(&t, one, 1u << i);
            add(&t, "</object>\n");
        }
        hwloc_bitmap_foreach_end();
        add_gpus(&t, i);
        add(&t, "</object>\n");
    }
    add(&t, "</object>\n</topology>\n");
    hwloc_bitmap_free(one);
    hwloc_bitmap_free(all);
    return t.bytes;
}

/* Cores 0-7,16-23 and 8-15,24-31. */
static hwloc_topology_t large_machine(void)
{
    hwloc_bitmap_t sockets[N_SOCKETS] = {hwloc_bitmap_alloc(), hwloc_bitmap_alloc()};
    hwloc_topology_t t;
    hwloc_bitmap_list_sscanf(sockets[0], "0-7,16-23");
    hwloc_bitmap_list_sscanf(sockets[1], "8-15,24-31");
    char *xml = make_xml(sockets);
    assert_int_equal(hwloc_topology_init(&t), 0);
    assert_int_equal(hwloc_topology_set_io_types_filter(t, HWLOC_TYPE_FILTER_KEEP_IMPORTANT), 0);
    assert_int_equal(hwloc_topology_set_xmlbuffer(t, xml, (int)strlen(xml) + 1), 0);
    assert_int_equal(hwloc_topology_load(t), 0);
    hwloc_bitmap_free(sockets[0]);
    hwloc_bitmap_free(sockets[1]);
    return t;
}

static void assert_choice(hwloc_topology_t t, const char *gpu, const char *now, enum placement want,
                          const char *near)
{
    hwloc_bitmap_t now_set = hwloc_bitmap_alloc(), near_set = hwloc_bitmap_alloc();
    char text[64];
    hwloc_bitmap_list_sscanf(now_set, now);
    assert_int_equal(placement_choose(t, gpu, now_set, near_set), want);
    hwloc_bitmap_list_snprintf(text, sizeof(text), near_set);
    assert_string_equal(text, near);
    hwloc_bitmap_free(near_set);
    hwloc_bitmap_free(now_set);
}

static void chooses(void **state)
{
    const char *first = "0-7,16-23", *second = "8-15,24-31", gpus[] = "0123";
    hwloc_topology_t t = large_machine();
    (void)state;
    for (const char *g = gpus; *g; g++) {
        char a[] = "0000:1x:00.0", b[] = "0000:2x:00.0";
        a[6] = b[6] = *g;
        assert_choice(t, a, "0-31", PLACEMENT_BIND, first);
        assert_choice(t, b, "0-31", PLACEMENT_BIND, second);
    }
    /* bound before: near, away, on both sides */
    assert_choice(t, "0000:10:00.0", first, PLACEMENT_NEAR, first);
    assert_choice(t, "0000:10:00.0", "3", PLACEMENT_NEAR, first);
    assert_choice(t, "0000:10:00.0", second, PLACEMENT_BOUND, first);
    assert_choice(t, "0000:20:00.0", "0-30", PLACEMENT_BOUND, second);
    /* a binding that names more than the machine has is none */
    assert_choice(t, "0000:20:00.0", "0-63", PLACEMENT_BIND, second);
    hwloc_topology_destroy(t);
}

static void unknown_devices(void **state)
{
    hwloc_topology_t t = large_machine();
    (void)state;
    assert_choice(t, "0000:14:00.0", "0-31", PLACEMENT_UNKNOWN, "");
    assert_choice(t, "0001:10:00.0", "0-31", PLACEMENT_UNKNOWN, "");
    assert_choice(t, "nothing", "0-31", PLACEMENT_UNKNOWN, "");
    hwloc_topology_destroy(t);
    /* a virtual machine: its cores and no PCI device */
    assert_int_equal(hwloc_topology_init(&t), 0);
    assert_int_equal(hwloc_topology_set_synthetic(t, "pack:2 pu:4"), 0);
    assert_int_equal(hwloc_topology_load(t), 0);
    assert_choice(t, "0000:10:00.0", "0-7", PLACEMENT_UNKNOWN, "");
    hwloc_topology_destroy(t);
}

/* A thread that is there before the binding. */
struct sleeper {
    pthread_t thread;
    pthread_barrier_t started, over;
    pid_t tid;
};

static void *sleep_on(void *arg)
{
    struct sleeper *s = arg;
    s->tid = gettid();
    pthread_barrier_wait(&s->started);
    pthread_barrier_wait(&s->over);
    return NULL;
}

static void assert_on(pid_t tid, int core)
{
    cpu_set_t set;
    assert_int_equal(sched_getaffinity(tid, sizeof(set), &set), 0);
    assert_int_equal(CPU_COUNT(&set), 1);
    assert_true(CPU_ISSET(core, &set));
}

/* placement_near() on the topology that hwloc finds in HWLOC_XMLFILE, taken for this machine. */
static void binds_threads(void **state)
{
    struct sleeper s;
    cpu_set_t before, two;
    int cores[N_SOCKETS], n = 0, fd;
    char path[] = "/tmp/placement-XXXXXX";
    hwloc_bitmap_t sockets[N_SOCKETS] = {hwloc_bitmap_alloc(), hwloc_bitmap_alloc()};

    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof(before), &before), 0);
    CPU_ZERO(&two);
    for (int i = 0; i < CPU_SETSIZE && n < N_SOCKETS; i++)
        if (CPU_ISSET(i, &before)) {
            hwloc_bitmap_set(sockets[n], (unsigned)i);
            CPU_SET(i, &two);
            cores[n++] = i;
        }
    if (n < N_SOCKETS) {
        print_message("skipped: one core only\n");
        hwloc_bitmap_free(sockets[0]);
        hwloc_bitmap_free(sockets[1]);
        skip();
    }
    char *xml = make_xml(sockets);
    fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, xml, strlen(xml)), strlen(xml));
    close(fd);
    setenv("HWLOC_XMLFILE", path, 1);
    setenv("HWLOC_THISSYSTEM", "1", 1);
    assert_int_equal(sched_setaffinity(0, sizeof(two), &two), 0);
    pthread_barrier_init(&s.started, NULL, 2);
    pthread_barrier_init(&s.over, NULL, 2);
    assert_int_equal(pthread_create(&s.thread, NULL, sleep_on, &s), 0);
    pthread_barrier_wait(&s.started);

    placement_near("0000:23:00.0");
    assert_on(0, cores[1]);
    assert_on(s.tid, cores[1]);
    placement_near("0000:10:00.0"); // on the other side, but now it is bound
    assert_on(0, cores[1]);

    pthread_barrier_wait(&s.over);
    pthread_join(s.thread, NULL);
    pthread_barrier_destroy(&s.started);
    pthread_barrier_destroy(&s.over);
    unsetenv("HWLOC_XMLFILE");
    unsetenv("HWLOC_THISSYSTEM");
    unlink(path);
    sched_setaffinity(0, sizeof(before), &before);
    hwloc_bitmap_free(sockets[0]);
    hwloc_bitmap_free(sockets[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chooses),
        cmocka_unit_test(unknown_devices),
        cmocka_unit_test(binds_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
