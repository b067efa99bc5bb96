/* The signal thread and its three words of state. */
#include "client/interrupt.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "client/command.h"

static struct internvl_cancel *handle;
static atomic_int seen, busy;

static void *wait_for_signal(void *arg)
{
    (void)arg;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    for (;;) {
        int signal_number;
        if (sigwait(&set, &signal_number) != 0)
            continue;
        if (atomic_exchange(&seen, 1) || !atomic_load(&busy))
            _exit(EXIT_INTERRUPTED);
        internvl_cancel(handle);
    }
    return NULL;
}

void interrupt_start(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    handle = internvl_cancel_new();
    pthread_t thread;
    if (pthread_create(&thread, NULL, wait_for_signal, NULL) == 0)
        pthread_detach(thread);
    else // without the thread Ctrl-C does what it always does
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

struct internvl_cancel *interrupt_handle(void)
{
    return handle;
}

void interrupt_set_busy(int is_busy)
{
    atomic_store(&busy, is_busy);
}

int interrupt_seen(void)
{
    return atomic_load(&seen);
}
