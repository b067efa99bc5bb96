/* internvl forward and embed: named tensors, and the loss, of a prompt; a table, JSON, or a
 * safetensors file. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/command.h"
#include "client/conversation.h"
#include "client/interrupt.h"
#include "client/json_out.h"
#include "client/rpc.h"

struct summary {
    double min, max, mean;
    size_t n_not_finite;
};

static struct summary summarise(const struct internvl_tensor *t)
{
    struct summary s = {.min = INFINITY, .max = -INFINITY};
    size_t n = 0;
    for (size_t i = 0; i < t->n_elements; i++) {
        double x = (double)t->data[i];
        if (!isfinite(x)) {
            s.n_not_finite++;
            continue;
        }
        s.min = x < s.min ? x : s.min;
        s.max = x > s.max ? x : s.max;
        s.mean += x;
        n++;
    }
    if (n)
        s.mean /= (double)n;
    return s;
}

static void print_json(const struct internvl_forward_result *r)
{
    struct json_out j = {.file = stdout};
    json_object_begin(&j, NULL);
    json_array_begin(&j, "tensors");
    for (size_t i = 0; i < r->n_tensors; i++) {
        struct summary s = summarise(&r->tensors[i]);
        json_object_begin(&j, NULL);
        json_string(&j, "name", r->tensors[i].name);
        json_array_begin(&j, "shape");
        for (int d = 0; d < r->tensors[i].n_dims; d++)
            json_uint(&j, NULL, r->tensors[i].shape[d]);
        json_array_end(&j);
        json_double(&j, "min", s.min);
        json_double(&j, "max", s.max);
        json_double(&j, "mean", s.mean);
        json_uint(&j, "not_finite", s.n_not_finite);
        json_object_end(&j);
    }
    json_array_end(&j);
    if (r->has_loss)
        json_double(&j, "loss", r->loss);
    else
        json_null(&j, "loss");
    json_array_begin(&j, "token_logprobs");
    for (size_t i = 0; i < r->n_token_logprobs; i++)
        json_float(&j, NULL, r->token_logprobs[i]);
    json_array_end(&j);
    json_array_begin(&j, "token_ids");
    for (size_t i = 0; i < r->n_token_ids; i++)
        json_uint(&j, NULL, r->token_ids[i]);
    json_array_end(&j);
    json_object_end(&j);
    json_end_line(&j);
}

static void print_table(const struct internvl_forward_result *r)
{
    printf("%-28s %-22s %12s %12s %12s\n", "tensor", "shape", "min", "max", "mean");
    for (size_t i = 0; i < r->n_tensors; i++) {
        const struct internvl_tensor *t = &r->tensors[i];
        struct summary s = summarise(t);
        char shape[128];
        size_t n = 0;
        for (int d = 0; d < t->n_dims && n < sizeof(shape); d++)
            n += (size_t)snprintf(shape + n, sizeof(shape) - n, "%s%llu", d ? " x " : "",
                                  (unsigned long long)t->shape[d]);
        shape[n < sizeof(shape) ? n : sizeof(shape) - 1] = '\0';
        printf("%-28s %-22s %12.5g %12.5g %12.5g", t->name, shape, s.min, s.max, s.mean);
        if (s.n_not_finite)
            printf("  %zu not finite", s.n_not_finite);
        putchar('\n');
    }
    if (r->has_loss)
        printf("loss %.6f\n", r->loss);
    printf("%zu prompt tokens, %u of them of images, %.1f ms\n", r->n_token_ids,
           r->usage.image_tokens, (double)r->timing.total_us / 1000);
}

/* The safetensors format: length of the header, a JSON header padded with spaces, the bytes. */
static int write_safetensors(const char *path, const struct internvl_forward_result *r,
                             struct internvl_error *err)
{
    char *header = NULL;
    size_t n_header = 0;
    FILE *text = open_memstream(&header, &n_header);
    FILE *f = fopen(path, "wb");
    if (!text || !f) {
        rpc_error(err, INTERNVL_NOT_FOUND, "%s: %s", path, strerror(errno));
        if (text)
            fclose(text);
        if (f)
            fclose(f);
        free(header);
        return -1;
    }
    struct json_out j = {.file = text};
    uint64_t offset = 0;
    json_object_begin(&j, NULL);
    for (size_t i = 0; i < r->n_tensors; i++) {
        const struct internvl_tensor *t = &r->tensors[i];
        json_object_begin(&j, t->name);
        json_string(&j, "dtype", "F32");
        json_array_begin(&j, "shape");
        for (int d = 0; d < t->n_dims; d++)
            json_uint(&j, NULL, t->shape[d]);
        json_array_end(&j);
        json_array_begin(&j, "data_offsets");
        json_uint(&j, NULL, offset);
        json_uint(&j, NULL, offset += t->n_elements * sizeof(float));
        json_array_end(&j);
        json_object_end(&j);
    }
    json_object_end(&j);
    fclose(text);
    uint64_t n_padded = (n_header + 7) / 8 * 8;
    fwrite(&n_padded, sizeof(n_padded), 1, f);
    fprintf(f, "%s%*s", header, (int)(n_padded - n_header), "");
    for (size_t i = 0; i < r->n_tensors; i++)
        fwrite(r->tensors[i].data, sizeof(float), r->tensors[i].n_elements, f);
    free(header);
    int failed = ferror(f);
    if (fclose(f) != 0 || failed)
        return rpc_error(err, INTERNVL_INTERNAL, "%s could not be written", path);
    return 0;
}

/* --ids and --labels, as the request's arrays; 0 or an exit status. */
static int parse_lists(const struct command_options *o, struct internvl_forward_request *r,
                       uint32_t **ids, int32_t **labels)
{
    if (o->ids) {
        int64_t *list = command_parse_list(o->ids, 0, UINT32_MAX, &r->prompt.n_token_ids);
        if (!list)
            return command_usage(o, "--ids: '%s' is not a list of token ids", o->ids);
        *ids = command_alloc(r->prompt.n_token_ids, sizeof(**ids));
        for (size_t i = 0; i < r->prompt.n_token_ids; i++)
            (*ids)[i] = (uint32_t)list[i];
        free(list);
        r->prompt.token_ids = *ids;
    }
    if (o->labels) {
        int64_t *list = command_parse_list(o->labels, INT32_MIN, INT32_MAX, &r->n_labels);
        if (!list)
            return command_usage(o, "--labels: '%s' is not a list of numbers", o->labels);
        *labels = command_alloc(r->n_labels, sizeof(**labels));
        for (size_t i = 0; i < r->n_labels; i++)
            (*labels)[i] = (int32_t)list[i];
        free(list);
        r->labels = *labels;
    }
    return 0;
}

int command_forward(struct internvl_client *c, const struct command_options *o)
{
    static const char *const default_outputs[] = {"logits"};
    if (o->n_arguments != (o->ids ? 0 : 1))
        return command_usage(o, o->ids ? "either a question or --ids" : "one question is needed");
    struct internvl_error err = {0};
    struct conversation conversation = {0};
    struct internvl_forward_result result = {0};
    struct internvl_call_options call = command_call_options(o);
    uint32_t *ids = NULL;
    int32_t *labels = NULL;
    struct internvl_forward_request request = {.request_id = o->request_id,
                                               .outputs =
                                                   o->n_outputs ? o->outputs : default_outputs,
                                               .n_outputs = o->n_outputs ? o->n_outputs : 1,
                                               .logits_to_keep = o->logits_to_keep};
    int status = parse_lists(o, &request, &ids, &labels);
    if (status)
        goto out;
    if (!o->ids && conversation_from_options(&conversation, o, o->arguments[0], &err)) {
        status = command_fail(o, &err);
        goto out;
    }
    if (!o->ids)
        request.prompt = conversation_prompt(&conversation);
    interrupt_set_busy(1);
    if (internvl_forward(c, &request, &call, &result, &err) ||
        (o->output && write_safetensors(o->output, &result, &err)))
        status = command_fail(o, &err);
    else if (o->json)
        print_json(&result);
    else
        print_table(&result);
out:
    internvl_forward_result_release(&result);
    conversation_release(&conversation);
    free(ids);
    free(labels);
    return status;
}

int command_embed(struct internvl_client *c, const struct command_options *o)
{
    static const char *const default_outputs[] = {"mean"};
    if (o->n_arguments != 1)
        return command_usage(o, "one text is needed");
    struct internvl_error err = {0};
    struct conversation conversation = {0};
    struct internvl_forward_result result = {0};
    struct internvl_call_options call = command_call_options(o);
    int status = EXIT_OK;
    if (conversation_from_options(&conversation, o, o->arguments[0], &err)) {
        status = command_fail(o, &err);
        goto out;
    }
    struct internvl_embed_request request = {
        .request_id = o->request_id,
        .prompt = conversation_prompt(&conversation),
        .outputs = o->n_outputs ? o->outputs : default_outputs,
        .n_outputs = o->n_outputs ? o->n_outputs : 1,
    };
    interrupt_set_busy(1);
    if (internvl_embed(c, &request, &call, &result, &err) ||
        (o->output && write_safetensors(o->output, &result, &err)))
        status = command_fail(o, &err);
    else if (o->json)
        print_json(&result);
    else
        print_table(&result);
out:
    internvl_forward_result_release(&result);
    conversation_release(&conversation);
    return status;
}
