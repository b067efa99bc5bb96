/*
 * Ctrl-C: a thread that waits for SIGINT and cancels calls. The first one cancels what is under way
 * (or leaves at once when nothing is), the second one leaves without waiting. Either way the exit
 * status is 130.
 */
#ifndef INTERNVL_CLIENT_INTERRUPT_H
#define INTERNVL_CLIENT_INTERRUPT_H

#include "client/internvl_client.h"

/* Before any other thread exists (they inherit the blocked signal). */
void interrupt_start(void);
/* The handle that every call of the command is started with. */
struct internvl_cancel *interrupt_handle(void);
/* Whether a call is under way. */
void interrupt_set_busy(int busy);
int interrupt_seen(void);

#endif
