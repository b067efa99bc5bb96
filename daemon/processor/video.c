/*
 * FFmpeg on bytes in memory. See video.h.
 *
 * Counting frames may take a pass of its own (WebM and GIF say no count); the file is then opened
 * again rather than rewound, so that decoding always starts from a fresh state.
 */
#include "daemon/processor/video.h"

#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/mem.h>
#include <libswscale/swscale.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/log.h"

#define IO_BUFFER_BYTES 65536
#define DEMUXERS "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi"
#define DECODERS "h264,hevc,vp8,vp9,av1,libdav1d,mpeg4,mjpeg,gif,rawvideo"

struct memory_file {
    const uint8_t *bytes;
    int64_t n_bytes, at;
};

struct video {
    struct video_limits limits;
    struct memory_file file;
    struct timespec started; // processor time of this thread
    AVIOContext *io;
    AVFormatContext *format;
    AVCodecContext *codec;
    struct SwsContext *scaler;
    int scaler_width, scaler_height, scaler_format;
    int stream; // index of the first video stream
    AVPacket *packet;
    AVFrame *frame;
    uint8_t *rgb; // of the last frame converted
    size_t rgb_row_bytes;
};

static int read_memory(void *opaque, uint8_t *out, int n)
{
    struct memory_file *f = opaque;
    int64_t left = f->n_bytes - f->at;

    if (left <= 0)
        return AVERROR_EOF;
    if (n > left)
        n = (int)left;
    memcpy(out, f->bytes + f->at, (size_t)n);
    f->at += n;
    return n;
}

static int64_t seek_memory(void *opaque, int64_t offset, int whence)
{
    struct memory_file *f = opaque;

    switch (whence & ~AVSEEK_FORCE) {
    case AVSEEK_SIZE:
        return f->n_bytes;
    case SEEK_SET:
        break;
    case SEEK_CUR:
        offset += f->at;
        break;
    case SEEK_END:
        offset += f->n_bytes;
        break;
    default:
        return AVERROR(EINVAL);
    }
    if (offset < 0 || offset > f->n_bytes)
        return AVERROR(EINVAL);
    f->at = offset;
    return offset;
}

/* A file may name other files; none is opened. */
static int refuse_open(AVFormatContext *format, AVIOContext **io, const char *url, int flags,
                       AVDictionary **options)
{
    (void)format;
    (void)io;
    (void)url;
    (void)flags;
    (void)options;
    return AVERROR(EPERM);
}

static int is_late(void *opaque)
{
    const struct video *v = opaque;
    struct timespec now;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec - v->started.tv_sec >= v->limits.max_seconds;
}

static void silence_ffmpeg(void)
{
    av_log_set_level(AV_LOG_QUIET);
}

static int fail(struct video *v, struct error *err, const char *what)
{
    if (is_late(v))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the video takes more than %d s of processor time", v->limits.max_seconds);
    return error_set(err, ERROR_INVALID_ARGUMENT, "%s", what);
}

static void close_file(struct video *v)
{
    avcodec_free_context(&v->codec);
    avformat_close_input(&v->format);
    if (v->io)
        av_freep(&v->io->buffer);
    avio_context_free(&v->io);
}

static int open_format(struct video *v, struct error *err)
{
    uint8_t *buffer = av_malloc(IO_BUFFER_BYTES);

    v->file.at = 0;
    v->format = avformat_alloc_context();
    v->io = buffer ? avio_alloc_context(buffer, IO_BUFFER_BYTES, 0, &v->file, read_memory, NULL,
                                        seek_memory)
                   : NULL;
    if (!v->io || !v->format) {
        if (!v->io)
            av_free(buffer);
        return error_set(err, ERROR_RESOURCE_EXHAUSTED, "no memory for a video decoder");
    }
    v->format->pb = v->io;
    v->format->flags |= AVFMT_FLAG_CUSTOM_IO;
    v->format->io_open = refuse_open;
    v->format->interrupt_callback = (AVIOInterruptCB){.callback = is_late, .opaque = v};
    v->format->format_whitelist = av_strdup(DEMUXERS);
    v->format->codec_whitelist = av_strdup(DECODERS);
    v->format->protocol_whitelist = av_strdup("");
    v->format->max_streams = 32;
    v->format->probesize = 1 << 20;
    v->format->max_analyze_duration = AV_TIME_BASE;
    if (avformat_open_input(&v->format, NULL, NULL, NULL) < 0) // frees the context on failure
        return fail(v, err, "the file is not an mp4, webm, mkv, avi or gif video, or it is broken");
    return 0;
}

/* The first video stream, as the reference takes it. */
static int choose_stream(struct video *v, struct error *err)
{
    v->stream = -1;
    for (unsigned i = 0; i < v->format->nb_streams; i++) {
        AVStream *s = v->format->streams[i];

        if (s->codecpar->codec_type == AVMEDIA_TYPE_VIDEO && v->stream < 0)
            v->stream = (int)i;
        else
            s->discard = AVDISCARD_ALL;
    }
    return v->stream < 0 ? fail(v, err, "the file has no video stream") : 0;
}

static int check_size(struct video *v, int width, int height, struct error *err)
{
    if (width < 1 || height < 1)
        return fail(v, err, "the video does not say its frame size");
    if (width > RESIZE_MAX_SIDE || height > RESIZE_MAX_SIDE ||
        (int64_t)width * height > v->limits.max_pixels)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "frames of %d x %d pixels; at most %lld pixels are accepted", width,
                         height, (long long)v->limits.max_pixels);
    return 0;
}

/* FFmpeg compares this with sizes it has rounded up; check_size() has the exact word. */
static int64_t padded_pixels(const struct video *v)
{
    return 2 * v->limits.max_pixels + (1 << 20);
}

static int open_codec(struct video *v, struct error *err)
{
    const AVCodecParameters *p = v->format->streams[v->stream]->codecpar;
    const AVCodec *codec = avcodec_find_decoder(p->codec_id);
    const char *name = avcodec_get_name(p->codec_id);

    v->codec = codec ? avcodec_alloc_context3(codec) : NULL;
    if (!v->codec || avcodec_parameters_to_context(v->codec, p) < 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "there is no decoder for its codec \"%s\"",
                         name);
    v->codec->thread_count = 1;
    v->codec->max_pixels = padded_pixels(v);
    v->codec->codec_whitelist = av_strdup(DECODERS);
    if (avcodec_open2(v->codec, codec, NULL) < 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "its codec \"%s\" is not accepted", name);
    return 0;
}

/* Probing decodes too: the pixel limit holds for its decoders as for ours. */
static int find_stream_info(struct video *v, struct error *err)
{
    unsigned n = v->format->nb_streams;
    AVDictionary **options = xcalloc(n, sizeof(*options)); // [n], a stream each

    for (unsigned i = 0; i < n; i++)
        av_dict_set_int(&options[i], "max_pixels", padded_pixels(v), 0);
    int rc = avformat_find_stream_info(v->format, options);

    for (unsigned i = 0; i < n; i++)
        av_dict_free(&options[i]);
    free(options);
    return rc < 0 ? fail(v, err, "the video stream cannot be read") : 0;
}

static int open_file(struct video *v, struct error *err)
{
    if (open_format(v, err) || choose_stream(v, err))
        return -1;
    const AVCodecParameters *p = v->format->streams[v->stream]->codecpar;

    if (p->width > 0 && p->height > 0 && check_size(v, p->width, p->height, err))
        return -1;
    if (find_stream_info(v, err))
        return -1;
    if (choose_stream(v, err))
        return -1;
    p = v->format->streams[v->stream]->codecpar;
    if (check_size(v, p->width, p->height, err))
        return -1;
    return open_codec(v, err);
}

/* Packets of the stream, by a pass over the file. */
static int count_packets(struct video *v, int64_t *n_frames, struct error *err)
{
    *n_frames = 0;
    while (av_read_frame(v->format, v->packet) >= 0) {
        *n_frames += v->packet->stream_index == v->stream;
        av_packet_unref(v->packet);
        if (*n_frames > v->limits.max_frames)
            break;
    }
    if (is_late(v))
        return fail(v, err, "");
    close_file(v);
    return open_file(v, err);
}

static int read_info(struct video *v, struct video_info *info, struct error *err)
{
    const AVStream *s = v->format->streams[v->stream];

    *info = (struct video_info){
        .width = s->codecpar->width,
        .height = s->codecpar->height,
        .n_frames = s->nb_frames,
        .fps = s->avg_frame_rate.num > 0 && s->avg_frame_rate.den > 0
                   ? (double)s->avg_frame_rate.num / s->avg_frame_rate.den
                   : 0,
    };
    if (info->n_frames <= 0 && count_packets(v, &info->n_frames, err))
        return -1;
    if (info->n_frames > v->limits.max_frames)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the video has more than %lld frames, which is the limit",
                         (long long)v->limits.max_frames);
    if (info->n_frames < 1)
        return fail(v, err, "the video has no frames");
    return 0;
}

struct video *video_open(const uint8_t *bytes, size_t n_bytes, const struct video_limits *limits,
                         enum video_mode mode, struct video_info *info, struct error *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct video *v = xcalloc(1, sizeof(*v));

    pthread_once(&once, silence_ffmpeg);
    v->limits = *limits;
    v->file = (struct memory_file){.bytes = bytes, .n_bytes = (int64_t)n_bytes};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &v->started);
    v->packet = av_packet_alloc();
    v->frame = av_frame_alloc();
    if (!v->packet || !v->frame) {
        error_set(err, ERROR_RESOURCE_EXHAUSTED, "no memory for a video decoder");
        goto fail;
    }
    if (open_file(v, err) || (mode == VIDEO_WHOLE && read_info(v, info, err)))
        goto fail;
    return v;
fail:
    video_close(v);
    return NULL;
}

void video_close(struct video *v)
{
    if (!v)
        return;
    close_file(v);
    sws_freeContext(v->scaler);
    av_packet_free(&v->packet);
    av_frame_free(&v->frame);
    av_free(v->rgb);
    free(v);
}

/* v->frame as RGB24 in v->rgb. PyAV: sws_getCachedContext(…, SWS_BILINEAR) with swscale's default
 * colour space. */
static int convert_frame(struct video *v, struct error *err)
{
    const AVFrame *f = v->frame;

    if (check_size(v, f->width, f->height, err))
        return -1;
    if (!v->rgb || v->scaler_width != f->width || v->scaler_height != f->height ||
        v->scaler_format != f->format) {
        sws_freeContext(v->scaler);
        av_freep(&v->rgb);
        v->scaler = sws_getContext(f->width, f->height, (enum AVPixelFormat)f->format, f->width,
                                   f->height, AV_PIX_FMT_RGB24, SWS_BILINEAR, NULL, NULL, NULL);
        v->rgb_row_bytes = (3 * (size_t)f->width + 63) & ~(size_t)63;
        v->rgb = av_malloc(v->rgb_row_bytes * (size_t)f->height + 64);
        v->scaler_width = f->width;
        v->scaler_height = f->height;
        v->scaler_format = f->format;
    }
    if (!v->scaler || !v->rgb)
        return error_set(err, ERROR_RESOURCE_EXHAUSTED, "no memory to convert a frame");
    uint8_t *out[4] = {v->rgb};
    int row_bytes[4] = {(int)v->rgb_row_bytes};

    if (sws_scale(v->scaler, (const uint8_t *const *)f->data, f->linesize, 0, f->height, out,
                  row_bytes) != f->height)
        return fail(v, err, "a frame cannot be converted to RGB");
    return 0;
}

struct reading {
    const int64_t *indices;
    int n, n_done;
    int64_t n_decoded;
    video_frame_fn *on_frame;
    void *arg;
};

/* Takes what the decoder has; 0 when it wants more, 1 when the last index has been shown. */
static int take_frames(struct video *v, struct reading *r, struct error *err)
{
    int rc;

    while ((rc = avcodec_receive_frame(v->codec, v->frame)) >= 0) {
        int64_t index = r->n_decoded++;

        if (is_late(v))
            return fail(v, err, "");
        if (index == r->indices[r->n_done]) {
            if (convert_frame(v, err))
                return -1;
            struct rgb_view view = {.rgb = v->rgb,
                                    .row_bytes = v->rgb_row_bytes,
                                    .width = v->frame->width,
                                    .height = v->frame->height};

            while (r->n_done < r->n && r->indices[r->n_done] == index) {
                if (r->on_frame(r->arg, r->n_done++, &view, err))
                    return -1;
            }
        }
        av_frame_unref(v->frame);
        if (r->n_done == r->n)
            return 1;
    }
    if (rc != AVERROR(EAGAIN) && rc != AVERROR_EOF)
        return fail(v, err, "a frame of the video is broken");
    return 0;
}

int video_read(struct video *v, const int64_t *indices, int n, video_frame_fn *on_frame, void *arg,
               struct error *err)
{
    struct reading r = {.indices = indices, .n = n, .on_frame = on_frame, .arg = arg};
    int rc = 0;

    if (n < 1)
        return 0;
    while (rc == 0 && av_read_frame(v->format, v->packet) >= 0) {
        if (v->packet->stream_index == v->stream) {
            if (avcodec_send_packet(v->codec, v->packet) < 0)
                rc = fail(v, err, "the video stream is broken");
            else
                rc = take_frames(v, &r, err);
        }
        av_packet_unref(v->packet);
        if (rc == 0 && is_late(v))
            rc = fail(v, err, "");
    }
    if (rc == 0) { // the end of the file: what the decoder still holds
        avcodec_send_packet(v->codec, NULL);
        rc = take_frames(v, &r, err);
    }
    if (rc == 0)
        rc = error_set(err, ERROR_INVALID_ARGUMENT,
                       "the video ends after %lld frames; frame %lld is needed",
                       (long long)r.n_decoded, (long long)indices[r.n_done]);
    return rc < 0 ? -1 : 0;
}
