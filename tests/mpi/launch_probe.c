/*
 * A small daemon for launch_mpi_test: `launch_probe MODE DIR`. Alone it becomes a job of three
 * ranks, under mpirun or, with LAUNCH_PROBE_FORKS in the environment, without; each rank writes its
 * pid to DIR/RANK and then behaves as MODE says.
 *
 *   exit N    every rank finalizes, leaves with N
 *   die       rank 1 dies while the others wait
 *   serve     rank 0 waits for SIGUSR1, then stops the workers; a lost rank ends the job
 *   deaf      as serve, but nobody hears SIGUSR1
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/control.h"
#include "parallel/launch.h"

static void write_pid(const char *dir, int rank)
{
    char path[512], final[512];
    snprintf(path, sizeof(path), "%s/.%d", dir, rank);
    snprintf(final, sizeof(final), "%s/%d", dir, rank);
    FILE *f = fopen(path, "w");
    if (!f || fprintf(f, "%d\n", (int)getpid()) < 0 || fclose(f) || rename(path, final))
        die("cannot write %s", final);
}

static void serve_gateway(struct control *c, int world, int signal_fd)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = control_fd(c), .events = POLLIN},
                              {.fd = signal_fd, .events = POLLIN}};
        poll(p, 2, 500);
        struct message *m = control_next(c);
        if (m && m->type == CONTROL_LOST)
            die("the job ends with rank %d", m->rank);
        message_unref(m);
        if (p[1].revents)
            break;
    }
    for (int r = 1; r < world; r++)
        control_send(c, r, message_new(CONTROL_STOP, 0));
}

static void serve(const struct topology *t, const char *dir, int signal_fd)
{
    struct control *c = control_open(t, NULL);
    write_pid(dir, t->rank);
    if (t->rank == 0)
        serve_gateway(c, t->world, signal_fd);
    else
        message_unref(control_recv(c));
    control_close(c);
}

int main(int argc, char **argv)
{
    struct topology t = {.layout = {1, 1, 1}};
    sigset_t usr1;
    if (argc < 3)
        return 2;
    const char *mode = argv[1], *dir = argv[2];
    log_init();
    if (!launch_is_job()) {
        int status;
        if (!getenv("LAUNCH_PROBE_FORKS"))
            return launch_mpirun(3, argv);
        if (!launch_local(3, &status))
            return status;
    }
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr1, NULL);
    int signal_fd = signalfd(-1, &usr1, SFD_CLOEXEC);

    launch_init(&t.rank, &t.world);
    if (t.world != 3)
        die("%d ranks", t.world);
    if (strcmp(mode, "serve") == 0)
        serve(&t, dir, signal_fd);
    else if (strcmp(mode, "deaf") == 0)
        serve(&t, dir, -1);
    else if (strcmp(mode, "die") == 0 && t.rank == 1)
        die("as asked");
    else if (strcmp(mode, "die") == 0)
        launch_barrier();
    launch_finalize();
    return strcmp(mode, "exit") == 0 ? atoi(dir) : 0;
}
