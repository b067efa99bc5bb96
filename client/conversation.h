/*
 * A conversation being put together: messages, their parts, and the media files' bytes, all owned
 * here. Files are read whole; what they hold is the server's business.
 */
#ifndef INTERNVL_CLIENT_CONVERSATION_H
#define INTERNVL_CLIENT_CONVERSATION_H

#include <cjson/cJSON.h>

#include "client/command.h"
#include "client/internvl_client.h"

struct conversation { // {0} is empty
    struct internvl_message *messages;
    size_t n_messages;
};

void conversation_add_message(struct conversation *c, const char *role);
/* To the last message. A path "media:ID" is what was uploaded under ID. */
void conversation_add_text(struct conversation *c, const char *text);
int conversation_add_file(struct conversation *c, const char *path, int is_video,
                          const struct command_options *o, struct internvl_error *err);
/* A picture that is in memory; takes over `bytes`. */
void conversation_add_bytes(struct conversation *c, void *bytes, size_t n_bytes,
                            const struct command_options *o);
void conversation_drop_message(struct conversation *c);
/* --system, then one user message: media in the order given, then `question`. */
int conversation_from_options(struct conversation *c, const struct command_options *o,
                              const char *question, struct internvl_error *err);
/* [{"role": …, "content": text or [{"type": "text" | "image" | "video", "text" | "path": …}]}];
 * paths are relative to `folder`. */
int conversation_from_json(struct conversation *c, const cJSON *messages, const char *folder,
                           const struct command_options *o, struct internvl_error *err);
struct internvl_prompt conversation_prompt(const struct conversation *c); // borrowed from `c`
void conversation_release(struct conversation *c);

/* The whole of a file, NUL-terminated, freed by the caller; NULL and NOT_FOUND or
 * RESOURCE_EXHAUSTED (over 1 GiB). */
char *read_file(const char *path, size_t *n_bytes, struct internvl_error *err);

#endif
