/*
 * The `internvl` command's front: one option table, from which the parser and every --help are
 * made, and the list of subcommands. Options may stand before or after the subcommand and its
 * arguments; "--" ends them.
 */
#include "client/command.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/conversation.h"
#include "client/interrupt.h"
#include "client/rpc.h"

enum { // bits of a subcommand
    ASK = 1,
    CHAT = 2,
    FORWARD = 4,
    TOKENIZE = 8,
    INFO = 16,
    EVALUATE = 32,
    BENCH = 1024,
    SCORE = 64,
    EMBED = 128,
    UPLOAD = 2048,
    ANY = 4095,
    GENERATE = ASK | CHAT | EVALUATE | BENCH,
    PROMPT = ASK | FORWARD | TOKENIZE | SCORE | EMBED,
    MEDIA = PROMPT | CHAT | EVALUATE | BENCH,
};

static const struct subcommand {
    const char *name;
    unsigned bit;
    int (*run)(struct internvl_client *c, const struct command_options *o);
    const char *arguments, *summary, *details;
} subcommands[] = {
    {"ask", ASK, command_ask, "\"QUESTION\"", "ask one question, print the answer as it comes",
     "Pictures and videos come first, in the order given, then the question."},
    {"chat", CHAT, command_chat, "", "talk: several turns, the daemon sees all of them",
     "Reads one message a line from standard input. /image FILE and /video FILE (or media:ID of\n"
     "an upload) add to the next message, /reset forgets everything, /quit (or the end of the\n"
     "input) leaves."},
    {"forward", FORWARD, command_forward, "[\"QUESTION\"]",
     "one pass without generating: tensors and loss of a prompt",
     "Prints a line a tensor. --output writes them all as one safetensors file."},
    {"score", SCORE, command_score, "\"QUESTION\" \"ANSWER\"...",
     "log-probabilities of given answers to one question",
     "Each answer is put behind the prompt as it is; none is generated."},
    {"embed", EMBED, command_embed, "\"QUESTION\"",
     "features of pictures and text, per token or pooled",
     "Prints a line a tensor. --output writes them all as one safetensors file."},
    {"tokenize", TOKENIZE, command_tokenize, "[\"TEXT\"]", "text to token ids, or ids to text",
     "Plain text goes past the chat template, unless --chat or a picture asks for it."},
    {"upload", UPLOAD, command_upload, "FILE...", "leave pictures and videos with the daemon",
     "Prints a line a file: media:ID, which --image or --video of the other commands takes in\n"
     "place of a file. PNG, JPEG and WebP files are pictures, all others videos. The daemon\n"
     "forgets what has not been used for a while (--media-ttl)."},
    {"info", INFO, command_info, "", "model, limits, ranks and memory of the daemon", NULL},
    {"evaluate", EVALUATE, command_evaluate, "FILE.jsonl",
     "questions with known answers: accuracy per category",
     "Each line: {\"id\", \"category\", \"messages\": [{\"role\", \"content\"}], \"answer\"}; "
     "content is text or\n"
     "a list of {\"type\": \"text\" | \"image\" | \"video\", \"text\" | \"path\"}, paths relative "
     "to the file.\n"
     "Or a .tsv table with index, image (base64), question, answer, and A, B, … for choices.\n"
     "Several answers are a list; the best counts.\n"
     "A reply is correct when it equals the answer after stripping white space and lowercasing "
     "both,\n"
     "or, where there are choices, when it names the right letter (see --score).\n"
     "Greedy and at most 64 tokens unless options say otherwise. --output goes on where an earlier "
     "run\n"
     "of the same questions and settings was cut off; nothing that was answered is asked again."},
    {"bench", BENCH, command_bench, "[FILE.jsonl]", "throughput and latency of the daemon",
     "Requests are those of a file (as for evaluate), or made up; --image adds a picture to each\n"
     "of those. Without --request-rate --concurrency requests are always in flight; with it they\n"
     "arrive at random, so many a second, however long answers take."},
};
#define N_SUBCOMMANDS (sizeof(subcommands) / sizeof(subcommands[0]))

enum option_kind {
    KIND_ON, // int, no argument
    KIND_OFF,
    KIND_STRING,
    KIND_U32,
    KIND_I32,
    KIND_U64,
    KIND_FLOAT,
    KIND_DOUBLE,
    KIND_EARLY_STOPPING, // false, true or never
    KIND_IMAGE,          // lists
    KIND_VIDEO,
    KIND_STOP,
    KIND_STOP_ID,
    KIND_TENSOR,
    KIND_RESULTS,
    KIND_HELP, // answered at once
    KIND_VERSION,
};

#define AT(field) offsetof(struct command_options, field)
#define TILING(field, bit) AT(tiling.field), AT(tiling.set), bit
#define VIDEO_(field, bit) AT(video.field), AT(video.set), bit
#define SAMPLING(field, bit) AT(sampling.field), AT(sampling.set), bit

static const struct option {
    const char *name, *argument;
    unsigned commands;
    enum option_kind kind;
    const char *help;
    size_t offset;     // of the value in struct command_options
    size_t set_offset; // of the `set` mask, where mask is not 0
    uint32_t mask;
} options[] = {
    {"image", "FILE", MEDIA & ~EVALUATE, KIND_IMAGE,
     "a PNG, JPEG or WebP file, or media:ID of an upload; may be repeated", 0, 0, 0},
    {"video", "FILE", MEDIA & ~EVALUATE, KIND_VIDEO,
     "an mp4, webm, mkv or gif file, or media:ID of an upload; may be repeated", 0, 0, 0},
    {"system", "TEXT", MEDIA & ~EVALUATE, KIND_STRING, "a system message before the first turn",
     AT(system), 0, 0},
    {"min-patches", "N", MEDIA, KIND_U32, "smallest number of tiles of a picture",
     TILING(min_patches, INTERNVL_MIN_PATCHES)},
    {"max-patches", "N", MEDIA, KIND_U32, "largest number of tiles of a picture",
     TILING(max_patches, INTERNVL_MAX_PATCHES)},
    {"no-crop", NULL, MEDIA, KIND_OFF, "one tile a picture",
     TILING(crop_to_patches, INTERNVL_CROP_TO_PATCHES)},
    {"num-frames", "N", MEDIA, KIND_U32, "frames taken of a video",
     VIDEO_(num_frames, INTERNVL_NUM_FRAMES)},
    {"fps", "X", MEDIA, KIND_DOUBLE, "frames a second taken of a video", VIDEO_(fps, INTERNVL_FPS)},
    {"no-thumbnail", NULL, MEDIA, KIND_OFF, "no tile of the whole picture beside the others",
     TILING(use_thumbnail, INTERNVL_USE_THUMBNAIL)},
    {"initial-shift", "X", MEDIA, KIND_DOUBLE, "first frame taken of a video; default: half a step",
     VIDEO_(initial_shift, INTERNVL_INITIAL_SHIFT)},
    {"all-frames", NULL, MEDIA, KIND_OFF, "every frame of a video",
     VIDEO_(sample_frames, INTERNVL_SAMPLE_FRAMES)},
    {"max-tokens", "N", GENERATE, KIND_U32, "longest answer",
     SAMPLING(max_tokens, INTERNVL_MAX_TOKENS)},
    {"min-tokens", "N", GENERATE, KIND_U32, "shortest answer",
     SAMPLING(min_tokens, INTERNVL_MIN_TOKENS)},
    {"temperature", "X", GENERATE, KIND_FLOAT, "0 is greedy",
     SAMPLING(temperature, INTERNVL_TEMPERATURE)},
    {"top-p", "X", GENERATE, KIND_FLOAT, "keep the likeliest tokens up to this probability",
     SAMPLING(top_p, INTERNVL_TOP_P)},
    {"top-k", "N", GENERATE, KIND_U32, "keep the N likeliest tokens; 0: all",
     SAMPLING(top_k, INTERNVL_TOP_K)},
    {"min-p", "X", GENERATE, KIND_FLOAT, "drop tokens below X times the likeliest",
     SAMPLING(min_p, INTERNVL_MIN_P)},
    {"repetition-penalty", "X", GENERATE, KIND_FLOAT, "divide the logits of tokens seen by X",
     SAMPLING(repetition_penalty, INTERNVL_REPETITION_PENALTY)},
    {"presence-penalty", "X", GENERATE, KIND_FLOAT, "subtract X from tokens of the answer",
     SAMPLING(presence_penalty, INTERNVL_PRESENCE_PENALTY)},
    {"frequency-penalty", "X", GENERATE, KIND_FLOAT, "subtract X for every time a token was used",
     SAMPLING(frequency_penalty, INTERNVL_FREQUENCY_PENALTY)},
    {"seed", "N", GENERATE, KIND_U64, "of the random numbers; default: drawn by the daemon",
     SAMPLING(seed, INTERNVL_SEED)},
    {"n", "N", ASK, KIND_U32, "number of answers", SAMPLING(n, INTERNVL_N)},
    {"stop", "TEXT", GENERATE, KIND_STOP, "end the answer before this text; may be repeated", 0, 0,
     0},
    {"stop-token-id", "ID", GENERATE, KIND_STOP_ID, "end the answer at this token; may be repeated",
     0, 0, 0},
    {"include-stop", NULL, GENERATE, KIND_ON, "show the stop text too",
     AT(sampling.include_stop_str_in_output), 0, 0},
    {"ignore-eos", NULL, GENERATE, KIND_ON, "go on past the end token", AT(sampling.ignore_eos), 0,
     0},
    {"keep-special-tokens", NULL, GENERATE, KIND_OFF, "show special tokens in the text",
     SAMPLING(skip_special_tokens, INTERNVL_SKIP_SPECIAL_TOKENS)},
    {"num-beams", "N", GENERATE, KIND_U32, "beam search: the N best sequences so far go on [1]",
     SAMPLING(num_beams, INTERNVL_NUM_BEAMS)},
    {"length-penalty", "X", GENERATE, KIND_FLOAT, "beam search: divide scores by length^X [1]",
     SAMPLING(length_penalty, INTERNVL_LENGTH_PENALTY)},
    {"early-stopping", "WHEN", GENERATE, KIND_EARLY_STOPPING,
     "beam search ends: true, with N sequences finished; false, when no better one is likely; "
     "never, when none is possible [false]",
     AT(sampling.early_stopping), 0, 0},
    {"logprobs", "K", ASK, KIND_U32, "log-probabilities of the tokens, and of the K best",
     SAMPLING(logprobs, INTERNVL_LOGPROBS)},
    {"prompt-logprobs", "K", ASK, KIND_U32,
     "the same of the question's tokens, as the model reads it",
     SAMPLING(prompt_logprobs, INTERNVL_PROMPT_LOGPROBS)},
    {"priority", "N", GENERATE, KIND_I32, "smaller goes first [0]", AT(priority), 0, 0},
    {"cache-salt", "TEXT", GENERATE, KIND_STRING,
     "share cached prompts and pictures only with requests of the same salt", AT(cache_salt), 0, 0},
    {"request-id", "ID", ASK | FORWARD | SCORE | EMBED, KIND_STRING,
     "name of the request in the daemon's log", AT(request_id), 0, 0},
    {"tensor", "NAME", FORWARD | EMBED, KIND_TENSOR,
     "forward: logits, hidden_states, last_hidden_state, inputs_embeds, past_key_values, "
     "attentions, image_features, projector, vision.hidden_states, vision.last_hidden_state, "
     "vision.pooler_output, vision.layer0, vision.attentions [logits]; embed: last_hidden_state, "
     "last_token, mean, image_features, tile_mean, image_mean [mean]; may be repeated",
     0, 0, 0},
    {"logits-to-keep", "N", FORWARD, KIND_U32, "logits of the last N positions; 0: all",
     AT(logits_to_keep), 0, 0},
    {"labels", "LIST", FORWARD, KIND_STRING,
     "as many numbers as prompt tokens, -100 is ignored; gives the loss", AT(labels), 0, 0},
    {"ids", "LIST", FORWARD | TOKENIZE, KIND_STRING, "token ids instead of text: 1,2,3", AT(ids), 0,
     0},
    {"chat", NULL, TOKENIZE, KIND_ON, "through the chat template", AT(chat), 0, 0},
    {"output", "FILE", FORWARD | EMBED | EVALUATE, KIND_STRING,
     "forward, embed: tensors (safetensors); evaluate: results (JSONL)", AT(output), 0, 0},
    {"concurrency", "N", EVALUATE | BENCH, KIND_U32, "questions in flight [16]", AT(concurrency), 0,
     0},
    {"request-rate", "X", BENCH, KIND_DOUBLE, "arrivals a second (Poisson); 0: closed loop [0]",
     AT(request_rate), 0, 0},
    {"num-requests", "N", BENCH, KIND_U32, "requests that are measured [64]", AT(num_requests), 0,
     0},
    {"warm-up", "N", BENCH, KIND_U32, "requests before them [4]", AT(warm_up), 0, 0},
    {"input-len", "N", BENCH, KIND_U32, "words of a made-up prompt [16]", AT(input_len), 0, 0},
    {"output-len", "N", BENCH, KIND_U32, "exactly N tokens of each answer", AT(output_len), 0, 0},
    {"csv", "FILE", BENCH, KIND_STRING, "add the figures as a line", AT(csv), 0, 0},
    {"limit", "N", EVALUATE | BENCH, KIND_U32, "only the first N questions", AT(limit), 0, 0},
    {"score", "HOW", EVALUATE, KIND_STRING,
     "auto, exact, choice, number or anls, where the question does not say [auto]", AT(score), 0,
     0},
    {"tolerance", "X", EVALUATE, KIND_DOUBLE, "of --score number, relative [0.05]", AT(tolerance),
     0, 0},
    {"shard", "I/N", EVALUATE, KIND_STRING, "only questions I, I+N, …: one of N tasks", AT(shard),
     0, 0},
    {"results", "FILE", EVALUATE, KIND_RESULTS,
     "answers that are there already, of other shards; may be repeated", 0, 0, 0},
    {"retry-for", "SECONDS", EVALUATE, KIND_DOUBLE,
     "how long to try again while the daemon is away or full [60]", AT(retry_for_s), 0, 0},
    {"html", "FILE", EVALUATE, KIND_STRING, "a report with plots and pictures", AT(html), 0, 0},
    {"json", NULL, ANY, KIND_ON, "print JSON", AT(json), 0, 0},
    {"address", "HOST:PORT", ANY, KIND_STRING,
     "of the daemon [$INTERNVL_ADDRESS, else 127.0.0.1:50051]", AT(address), 0, 0},
    {"endpoint-file", "FILE", ANY, KIND_STRING,
     "instead of --address and --token-file: a line with the address and the token",
     AT(endpoint_file), 0, 0},
    {"timeout", "SECONDS", ANY, KIND_DOUBLE, "deadline of each call; 0: none [0]", AT(timeout_s), 0,
     0},
    {"token-file", "FILE", ANY, KIND_STRING, "bearer token, the file's first line", AT(token_file),
     0, 0},
    {"help", NULL, ANY, KIND_HELP, "this page", 0, 0, 0},
    {"version", NULL, ANY, KIND_VERSION, "the version", 0, 0, 0},
};
#define N_OPTIONS (sizeof(options) / sizeof(options[0]))

/* ---- memory, messages ---- */

void *command_alloc(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (!p) {
        fprintf(stderr, "internvl: out of memory\n");
        exit(EXIT_FAILED);
    }
    return p;
}

void *command_grow(void *array, size_t n, size_t size)
{
    if (n & (n - 1)) // room is left up to the next power of two
        return array;
    void *more = command_alloc(n ? 2 * n : 1, size);
    if (n)
        memcpy(more, array, n * size);
    free(array);
    return more;
}

int command_fail(const struct command_options *o, const struct internvl_error *err)
{
    if (interrupt_seen())
        return EXIT_INTERRUPTED;
    fprintf(stderr, "internvl: %s: %s: %s\n", o->command, internvl_code_name(err->code), err->msg);
    return EXIT_FAILED;
}

int command_usage(const struct command_options *o, const char *fmt, ...)
{
    const char *command = o->command ? o->command : "";
    const char *space = *command ? " " : "";
    fprintf(stderr, "internvl%s%s: ", space, command);
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, " (see internvl%s%s --help)\n", space, command);
    return EXIT_USAGE;
}

struct internvl_call_options command_call_options(const struct command_options *o)
{
    struct internvl_call_options c = {.cancel = interrupt_handle()};
    if (o->timeout_s > 0)
        c.timeout_ms = (int64_t)(o->timeout_s * 1000) + 1;
    return c;
}

struct internvl_generate_request command_generate_request(const struct command_options *o,
                                                          struct internvl_prompt prompt)
{
    return (struct internvl_generate_request){.request_id = o->request_id,
                                              .prompt = prompt,
                                              .sampling = o->sampling,
                                              .priority = o->priority,
                                              .cache_salt = o->cache_salt};
}

/* ---- help ---- */

static void print_options(unsigned commands)
{
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &options[i];
        char left[64];
        if (!(o->commands & commands))
            continue;
        snprintf(left, sizeof(left), "--%s%s%s", o->name, o->argument ? " " : "",
                 o->argument ? o->argument : "");
        printf("  %-26s %s\n", left, o->help);
    }
}

static void print_help(const struct subcommand *s)
{
    if (s) {
        printf("usage: internvl %s [OPTION]... %s\n\n%s\n", s->name, s->arguments, s->summary);
        if (s->details)
            printf("\n%s\n", s->details);
        printf("\n");
        print_options(s->bit);
        return;
    }
    printf("usage: internvl COMMAND [OPTION]... [ARGUMENT]...\n\nThe client of internvld.\n\n");
    for (size_t i = 0; i < N_SUBCOMMANDS; i++)
        printf("  %-10s %s\n", subcommands[i].name, subcommands[i].summary);
    printf("\nOptions of every command:\n\n");
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (options[i].commands == ANY)
            printf("  --%s%s%s\n      %s\n", options[i].name, options[i].argument ? " " : "",
                   options[i].argument ? options[i].argument : "", options[i].help);
    printf("\ninternvl COMMAND --help lists all options of a command.\n"
           "Exit status: 0 ok, 1 failed, 2 wrong usage, 130 interrupted.\n");
}

/* ---- parsing ---- */

static int parse_integer(const char *s, int64_t min, uint64_t max, uint64_t *out)
{
    char *end;
    errno = 0;
    if (*s == '-') {
        long long x = strtoll(s, &end, 10);
        *out = (uint64_t)x;
        return end != s && *end == '\0' && errno == 0 && x >= min ? 0 : -1;
    }
    if (!isdigit((unsigned char)*s))
        return -1;
    *out = strtoull(s, &end, 10);
    return *end == '\0' && errno == 0 && *out <= max ? 0 : -1;
}

static int parse_real(const char *s, double *out)
{
    char *end;
    if (*s == '\0' || isspace((unsigned char)*s))
        return -1;
    *out = strtod(s, &end);
    return *end == '\0' ? 0 : -1;
}

int64_t *command_parse_list(const char *text, int64_t min, int64_t max, size_t *n)
{
    int64_t *list = NULL;
    *n = 0;
    for (const char *s = text;;) {
        while (isspace((unsigned char)*s))
            s++;
        char *end;
        errno = 0;
        long long x = strtoll(s, &end, 10);
        if (end == s || errno || x < min || x > max) {
            free(list);
            return NULL;
        }
        list = command_grow(list, *n, sizeof(*list));
        list[(*n)++] = x;
        while (isspace((unsigned char)*end))
            end++;
        if (*end == '\0')
            return list;
        s = *end == ',' ? end + 1 : end;
    }
}

static void add_media(struct command_options *o, const char *path, int is_video)
{
    o->media = command_grow(o->media, o->n_media, sizeof(*o->media));
    o->media[o->n_media].path = path;
    o->media[o->n_media++].is_video = is_video;
}

/* Options that gather in lists. */
static int add_to_list(struct command_options *o, const struct option *option, const char *value)
{
    struct internvl_sampling *s = &o->sampling;
    uint64_t id;
    switch (option->kind) {
    case KIND_STOP:
        o->stop = command_grow(o->stop, s->n_stop, sizeof(*o->stop));
        o->stop[s->n_stop++] = value;
        s->stop = o->stop;
        return 0;
    case KIND_STOP_ID:
        if (parse_integer(value, 0, UINT32_MAX, &id))
            return -1;
        o->stop_token_ids =
            command_grow(o->stop_token_ids, s->n_stop_token_ids, sizeof(*o->stop_token_ids));
        o->stop_token_ids[s->n_stop_token_ids++] = (uint32_t)id;
        s->stop_token_ids = o->stop_token_ids;
        return 0;
    case KIND_RESULTS:
        o->results = command_grow(o->results, o->n_results, sizeof(*o->results));
        o->results[o->n_results++] = value;
        return 0;
    case KIND_TENSOR:
        o->outputs = command_grow(o->outputs, o->n_outputs, sizeof(*o->outputs));
        o->outputs[o->n_outputs++] = value;
        return 0;
    default:
        add_media(o, value, option->kind == KIND_VIDEO);
        return 0;
    }
}

static int parse_early_stopping(const char *value, uint32_t *out)
{
    static const char *const names[] = {"false", "true", "never"};
    for (uint32_t i = 0; i < 3; i++)
        if (strcmp(value, names[i]) == 0) {
            *out = i;
            return 0;
        }
    return -1;
}

/* Stores one option's value; -1 when it is not of the option's kind. */
static int set_option(struct command_options *o, const struct option *option, const char *value)
{
    char *field = (char *)o + option->offset;
    uint64_t integer = 0;
    double real = 0;
    if (option->mask)
        *(uint32_t *)((char *)o + option->set_offset) |= option->mask;
    switch (option->kind) {
    case KIND_ON:
    case KIND_OFF:
        *(int *)field = option->kind == KIND_ON;
        return 0;
    case KIND_STRING:
        *(const char **)field = value;
        return 0;
    case KIND_U32:
        if (parse_integer(value, 0, UINT32_MAX, &integer))
            return -1;
        *(uint32_t *)field = (uint32_t)integer;
        return 0;
    case KIND_I32:
        if (parse_integer(value, INT32_MIN, INT32_MAX, &integer))
            return -1;
        *(int32_t *)field = (int32_t)integer;
        return 0;
    case KIND_U64:
        if (parse_integer(value, 0, UINT64_MAX, &integer))
            return -1;
        *(uint64_t *)field = integer;
        return 0;
    case KIND_FLOAT:
        if (parse_real(value, &real))
            return -1;
        *(float *)field = (float)real;
        return 0;
    case KIND_EARLY_STOPPING:
        return parse_early_stopping(value, (uint32_t *)field);
    case KIND_DOUBLE:
        if (parse_real(value, &real))
            return -1;
        *(double *)field = real;
        return 0;
    default:
        return add_to_list(o, option, value);
    }
}

static const struct option *find_option(const char *name, size_t n)
{
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (strlen(options[i].name) == n && strncmp(options[i].name, name, n) == 0)
            return &options[i];
    return NULL;
}

static const struct subcommand *find_subcommand(const char *name)
{
    for (size_t i = 0; i < N_SUBCOMMANDS; i++)
        if (strcmp(subcommands[i].name, name) == 0)
            return &subcommands[i];
    return NULL;
}

struct parsed {
    const struct subcommand *subcommand;
    const struct option *seen[N_OPTIONS]; // checked once the command is known
    size_t n_seen;
    int help, version;
};

/* One "--name", "--name=value" or "--name value"; *i moves past the value. 0 or an exit status. */
static int parse_option(struct command_options *o, struct parsed *p, int argc, char **argv, int *i)
{
    const char *word = argv[*i], *name = word + 2, *value = strchr(name, '=');
    size_t n = value ? (size_t)(value - name) : strlen(name);
    if (strcmp(word, "-h") == 0) {
        name = "help";
        n = 4;
    }
    const struct option *option =
        word[1] == '-' || strcmp(word, "-h") == 0 ? find_option(name, n) : NULL;
    if (!option)
        return command_usage(o, "unknown option '%s'", word);
    if (!option->argument && value)
        return command_usage(o, "option --%s takes no value", option->name);
    if (option->argument && value)
        value++;
    else if (option->argument && *i + 1 < argc)
        value = argv[++*i];
    else if (option->argument)
        return command_usage(o, "option --%s needs a value: %s", option->name, option->argument);
    if (option->kind == KIND_HELP)
        p->help = 1;
    else if (option->kind == KIND_VERSION)
        p->version = 1;
    else if (set_option(o, option, value))
        return command_usage(o, "option --%s: '%s' is not a value for %s", option->name, value,
                             option->argument);
    for (size_t k = 0; k < p->n_seen; k++)
        if (p->seen[k] == option)
            return 0;
    p->seen[p->n_seen++] = option;
    return 0;
}

static int parse_arguments(struct command_options *o, struct parsed *p, int argc, char **argv)
{
    int ended = 0;
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        if (!ended && strcmp(word, "--") == 0) {
            ended = 1;
        } else if (!ended && word[0] == '-' && word[1] != '\0') {
            int status = parse_option(o, p, argc, argv, &i);
            if (status)
                return status;
        } else if (!p->subcommand) {
            p->subcommand = find_subcommand(word);
            if (!p->subcommand)
                return command_usage(o, "unknown command '%s'", word);
            o->command = p->subcommand->name;
        } else {
            o->arguments = command_grow(o->arguments, o->n_arguments, sizeof(*o->arguments));
            o->arguments[o->n_arguments++] = word;
        }
    }
    for (size_t k = 0; p->subcommand && k < p->n_seen; k++)
        if (!(p->seen[k]->commands & p->subcommand->bit))
            return command_usage(o, "option --%s is not one of this command's", p->seen[k]->name);
    return 0;
}

/* ---- running ---- */

/* The token file's first line, freed by the caller; NULL and `err` when it cannot be read. */
static char *read_token(const char *path, struct internvl_error *err)
{
    size_t n_bytes;
    char *token = read_file(path, &n_bytes, err);
    if (token)
        token[strcspn(token, "\r\n")] = '\0';
    return token;
}

int command_endpoint_read(const struct command_options *o, struct command_endpoint *e,
                          struct internvl_error *err)
{
    size_t n_bytes;
    if (!o->endpoint_file) {
        e->address = strdup(o->address);
        return o->token_file && !(e->token = read_token(o->token_file, err)) ? -1 : 0;
    }
    e->address = read_file(o->endpoint_file, &n_bytes, err);
    if (!e->address)
        return -1;
    e->address[strcspn(e->address, "\r\n")] = '\0';
    char *space = strchr(e->address, ' ');
    if (space) {
        *space = '\0';
        e->token = strdup(space + 1);
    }
    if (*e->address)
        return 0;
    return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "%s holds no address", o->endpoint_file);
}

int command_endpoint_equal(const struct command_endpoint *a, const struct command_endpoint *b)
{
    if (!a->address || !b->address || strcmp(a->address, b->address) != 0)
        return 0;
    return a->token && b->token ? strcmp(a->token, b->token) == 0 : a->token == b->token;
}

void command_endpoint_release(struct command_endpoint *e)
{
    free(e->address);
    free(e->token);
    *e = (struct command_endpoint){0};
}

struct internvl_client *command_connect(const struct command_endpoint *e,
                                        struct internvl_error *err)
{
    struct internvl_options connect = {.address = e->address, .token = e->token};
    return internvl_connect(&connect, err);
}

static int run(const struct subcommand *s, struct command_options *o)
{
    struct internvl_error err = {0};
    struct command_endpoint endpoint = {0};
    struct internvl_client *c = NULL;
    interrupt_start();
    if (command_endpoint_read(o, &endpoint, &err) == 0)
        c = command_connect(&endpoint, &err);
    int status = c ? s->run(c, o) : command_fail(o, &err);
    internvl_close(c);
    command_endpoint_release(&endpoint);
    if (fflush(stdout) != 0 && status == EXIT_OK) {
        fprintf(stderr, "internvl: %s: standard output: %s\n", o->command, strerror(errno));
        status = EXIT_FAILED;
    }
    return status;
}

int main(int argc, char **argv)
{
    struct command_options o = {.concurrency = 16,
                                .num_requests = 64,
                                .warm_up = 4,
                                .input_len = 16,
                                .tolerance = 0.05,
                                .retry_for_s = 60,
                                .address = getenv("INTERNVL_ADDRESS")};
    struct parsed parsed = {0};
    if (!o.address || !*o.address)
        o.address = "127.0.0.1:50051";
    int status = parse_arguments(&o, &parsed, argc, argv);
    if (status == 0 && parsed.version)
        printf("internvl %s\n", internvl_version());
    else if (status == 0 && parsed.help)
        print_help(parsed.subcommand);
    else if (status == 0 && !parsed.subcommand)
        status = command_usage(&o, "no command given");
    else if (status == 0)
        status = run(parsed.subcommand, &o);
    free(o.media);
    free(o.stop);
    free(o.stop_token_ids);
    free(o.outputs);
    free(o.results);
    free(o.arguments);
    return status;
}
