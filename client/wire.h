/*
 * The client's plain structs and the wire's messages, one into the other.
 *
 * wire_pool owns what a conversion allocates; media bytes are not copied. Reading is strict where a
 * wrong answer could be read past its end (tensor sizes), and INTERNAL is the code for an answer
 * that makes no sense. Nothing here knows gRPC.
 */
#ifndef INTERNVL_CLIENT_WIRE_H
#define INTERNVL_CLIENT_WIRE_H

#include "client/internvl_client.h"
#include "internvl/v1/internvl.pb-c.h"

/* Memory that goes at once. {0} is empty. */
struct wire_pool {
    struct wire_block *blocks;
};
void *wire_alloc(struct wire_pool *p, size_t n, size_t size); // zeroed, never NULL
void wire_pool_release(struct wire_pool *p);

/* Requests: built in `p`, pointing into `r`'s own strings and bytes. */
Internvl__V1__GenerateRequest *wire_generate(struct wire_pool *p,
                                             const struct internvl_generate_request *r);
Internvl__V1__ForwardRequest *wire_forward(struct wire_pool *p,
                                           const struct internvl_forward_request *r);
Internvl__V1__ScoreRequest *wire_score(struct wire_pool *p, const struct internvl_score_request *r);
Internvl__V1__EmbedRequest *wire_embed(struct wire_pool *p, const struct internvl_embed_request *r);
Internvl__V1__TokenizeRequest *wire_tokenize(struct wire_pool *p,
                                             const struct internvl_tokenize_request *r);

/* UploadMedia's stream: the start, then the bytes in chunks, then NULL. */
struct wire_upload {
    const struct internvl_upload *request;
    size_t n_sent;
    Internvl__V1__UploadMediaStart start;
    Internvl__V1__UploadMediaRequest message;
};
const ProtobufCMessage *wire_upload_first(struct wire_upload *u, const struct internvl_upload *r);
const ProtobufCMessage *wire_upload_next(void *upload); // a struct wire_upload
int wire_read_upload(const Internvl__V1__UploadMediaResponse *m, struct internvl_upload_result *out,
                     struct internvl_error *err);

/* Answers. An event points into `m` and `p`; results own their memory. */
int wire_read_event(struct wire_pool *p, const Internvl__V1__GenerateResponse *m,
                    struct internvl_event *e, struct internvl_error *err);
void wire_read_score(const Internvl__V1__ScoreResponse *m, struct internvl_score_result *out);
void wire_read_tokenize(const Internvl__V1__TokenizeResponse *m,
                        struct internvl_tokenize_result *out);
void wire_read_model(const Internvl__V1__GetModelResponse *m, struct internvl_model *out);

/* Forward's stream: header, its bytes in chunks, the next header, …, done. */
struct wire_forward_reader {
    struct internvl_forward_result *out;
    size_t n_allocated;     // tensors
    size_t n_bytes_missing; // of the last tensor
    int done;
};
int wire_read_forward(struct wire_forward_reader *r, const Internvl__V1__ForwardResponse *m,
                      struct internvl_error *err);
/* After the stream's end: 0, or INTERNAL when a tensor or the end is missing. */
int wire_forward_complete(const struct wire_forward_reader *r, struct internvl_error *err);

#endif
