/*
 * The `internvl` command: what its subcommands share.
 *
 * command.c owns the option table, from which parsing and every --help are made; each subcommand is
 * one function in a file of its own, which gets the parsed options and returns the exit status:
 * 0 ok, 1 failed (one line on standard error), 2 wrong usage, 130 interrupted.
 */
#ifndef INTERNVL_CLIENT_COMMAND_H
#define INTERNVL_CLIENT_COMMAND_H

#include <stddef.h>
#include <stdint.h>

#include "client/internvl_client.h"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };

struct media_file {
    const char *path;
    int is_video;
};

struct command_options {
    const char *command; // the subcommand's name
    const char *address, *token_file;
    double timeout_s; // 0: none
    int json;
    struct media_file *media; // [n_media] in the order given
    size_t n_media;
    const char *system;
    struct internvl_tiling tiling;
    struct internvl_video video;
    struct internvl_sampling sampling; // its arrays point below
    const char **stop;
    uint32_t *stop_token_ids;
    const char *request_id;
    int32_t priority;
    const char *cache_salt;
    const char **outputs; // forward --tensor [n_outputs]
    size_t n_outputs;
    uint32_t logits_to_keep;
    const char *labels, *ids; // lists as text
    int chat;                 // tokenize --chat
    const char *output;
    uint32_t concurrency, limit;
    const char *endpoint_file;
    const char *score, *shard, *html; // evaluate
    double tolerance, retry_for_s;
    const char **results; // evaluate --results [n_results]
    size_t n_results;
    double request_rate; // bench
    uint32_t num_requests, warm_up, input_len, output_len;
    const char *csv;
    const char **arguments; // [n_arguments] what is not an option
    size_t n_arguments;
};

/* One line "internvl: COMMAND: CODE: sentence" on standard error; returns EXIT_FAILED, or
 * EXIT_INTERRUPTED when Ctrl-C was the cause. */
int command_fail(const struct command_options *o, const struct internvl_error *err);
/* One line and a hint to --help; returns EXIT_USAGE. */
int command_usage(const struct command_options *o, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* Where the daemon is and what it wants to hear: of --endpoint-file, else of --address and
 * --token-file. Texts are owned. */
struct command_endpoint {  // {0} is empty
    char *address, *token; // token: NULL for none
};
int command_endpoint_read(const struct command_options *o, struct command_endpoint *e,
                          struct internvl_error *err);
int command_endpoint_equal(const struct command_endpoint *a, const struct command_endpoint *b);
void command_endpoint_release(struct command_endpoint *e);
struct internvl_client *command_connect(const struct command_endpoint *e,
                                        struct internvl_error *err);
struct internvl_call_options command_call_options(const struct command_options *o);
/* What the options say of a Generate of `prompt`, borrowed from both. */
struct internvl_generate_request command_generate_request(const struct command_options *o,
                                                          struct internvl_prompt prompt);

/* "1,2,-100" as integers [*n], freed by the caller; NULL when it is not such a list or a number is
 * outside [min, max]. */
int64_t *command_parse_list(const char *text, int64_t min, int64_t max, size_t *n);

void *command_alloc(size_t n, size_t size); // zeroed; ends the program when there is no memory
/* Room for one more in an array of n elements, grown in powers of two. */
void *command_grow(void *array, size_t n, size_t size);

int command_ask(struct internvl_client *c, const struct command_options *o);
int command_chat(struct internvl_client *c, const struct command_options *o);
int command_forward(struct internvl_client *c, const struct command_options *o);
int command_score(struct internvl_client *c, const struct command_options *o);
int command_embed(struct internvl_client *c, const struct command_options *o);
int command_tokenize(struct internvl_client *c, const struct command_options *o);
int command_upload(struct internvl_client *c, const struct command_options *o);
int command_info(struct internvl_client *c, const struct command_options *o);
int command_evaluate(struct internvl_client *c, const struct command_options *o);
int command_bench(struct internvl_client *c, const struct command_options *o);

#endif
