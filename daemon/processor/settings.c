/*
 * The processors' JSON files. See settings.h.
 */
#include "daemon/processor/settings.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <string.h>

#include "daemon/processor/config_file.h"

#define MAX_FILE_BYTES ((size_t)1 << 20)
#define MAX_TILE_SIDE 4096

/* One processor's object and the name of the file it stands in, for messages. */
struct source {
    const cJSON *object; // NULL: there is none
    const char *file;
};

struct files {
    cJSON *processor, *image, *video;
};

static const struct image_settings imagenet = {
    .crop_to_patches = 1, .min_patches = 1, .max_patches = 12};
static const double imagenet_mean[] = {0.485, 0.456, 0.406}, imagenet_std[] = {0.229, 0.224, 0.225};
static const double clip_mean[] = {0.48145466, 0.4578275, 0.40821073},
                    clip_std[] = {0.26862954, 0.26130258, 0.27577711};

static int refuse(struct error *err, const struct source *s, const char *what)
{
    return error_set(err, ERROR_FAILED_PRECONDITION, "%s: %s", s->file, what);
}

static int load_size(const struct source *s, struct image_settings *out, struct error *err)
{
    const cJSON *size = cJSON_GetObjectItemCaseSensitive(s->object, "size");

    out->tile_width = out->tile_height = 384; // the class default
    if (!size || cJSON_IsNull(size))
        return 0;
    if (cJSON_IsNumber(size)) {
        if (config_int(s->object, "size", 1, MAX_TILE_SIDE, &out->tile_width, s->file, err))
            return -1;
        out->tile_height = out->tile_width;
        return 0;
    }
    if (!cJSON_GetObjectItemCaseSensitive(size, "height") ||
        !cJSON_GetObjectItemCaseSensitive(size, "width"))
        return refuse(err, s, "\"size\" must be {\"height\": …, \"width\": …}");
    return config_int(size, "height", 1, MAX_TILE_SIDE, &out->tile_height, s->file, err) ||
                   config_int(size, "width", 1, MAX_TILE_SIDE, &out->tile_width, s->file, err)
               ? -1
               : 0;
}

/* mean or std, per channel: float32(value) * float32(1 / rescale_factor), as
 * BaseImageProcessorFast fuses rescaling into normalising. */
static int load_channels(const struct source *s, const char *name, const double *fallback,
                         int n_channels, double rescale, float *out, struct error *err)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(s->object, name);
    int n = cJSON_IsArray(list) ? cJSON_GetArraySize(list) : 0;

    if (list && !cJSON_IsNull(list) && n != 3 && n != n_channels)
        return error_set(err, ERROR_FAILED_PRECONDITION, "%s: \"%s\" must be a list of %d numbers",
                         s->file, name, n_channels);
    for (int c = 0; c < n_channels; c++) {
        const cJSON *item = n ? cJSON_GetArrayItem(list, c) : NULL;
        double value = n ? cJSON_IsNumber(item) ? item->valuedouble : NAN : fallback[c < 3 ? c : 2];

        if (!isfinite(value) || (strcmp(name, "image_std") == 0 && !(value > 0)))
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             "%s: \"%s\" has an entry that is no usable number", s->file, name);
        out[c] = (float)value * (float)(1.0 / rescale);
    }
    return 0;
}

/* What every picture and frame goes through must be on; what would change it must be off. */
static int check_steps(const struct source *s, struct error *err)
{
    static const char *const on[] = {"do_resize", "do_rescale", "do_normalize"};
    static const char *const off[] = {"do_center_crop", "do_pad"};
    const cJSON *resample = cJSON_GetObjectItemCaseSensitive(s->object, "resample");

    for (int i = 0; i < 3; i++) {
        int value = 1;

        if (config_bool(s->object, on[i], &value, s->file, err))
            return -1;
        if (!value)
            return error_set(err, ERROR_FAILED_PRECONDITION, "%s: \"%s\": false is not supported",
                             s->file, on[i]);
    }
    for (int i = 0; i < 2; i++) {
        int value = 0;

        if (config_bool(s->object, off[i], &value, s->file, err))
            return -1;
        if (value)
            return error_set(err, ERROR_FAILED_PRECONDITION, "%s: \"%s\": true is not supported",
                             s->file, off[i]);
    }
    if (resample && !cJSON_IsNull(resample) &&
        !(cJSON_IsNumber(resample) && resample->valuedouble == 3))
        return refuse(err, s, "\"resample\" must be 3 (bicubic)");
    return 0;
}

static int check_type(const struct source *s, const char *name, const char *accepted,
                      struct error *err)
{
    const char *type = config_string(s->object, name, s->file, err);

    if (err->code)
        return -1;
    if (type && strncmp(type, accepted, strlen(accepted)))
        return error_set(err, ERROR_FAILED_PRECONDITION, "%s: \"%s\" is \"%.40s\"; %s is supported",
                         s->file, name, type, accepted);
    return 0;
}

/* The fields that the image and the video processor share. */
static int load_pixels(const struct source *s, int n_channels, struct image_settings *out,
                       struct error *err)
{
    double rescale = 1.0 / 255;

    if (check_steps(s, err) || load_size(s, out, err) ||
        config_number(s->object, "rescale_factor", &rescale, s->file, err))
        return -1;
    if (!(rescale > 0))
        return refuse(err, s, "\"rescale_factor\" must be positive");
    return load_channels(s, "image_mean", clip_mean, n_channels, rescale, out->mean, err) ||
                   load_channels(s, "image_std", clip_std, n_channels, rescale, out->std, err)
               ? -1
               : 0;
}

/* No file at all: the model's own size and the normalisation of all InternVL models. */
static void default_pixels(const struct processor_model *m, struct image_settings *out)
{
    *out = imagenet;
    out->tile_width = m->image_width;
    out->tile_height = m->image_height;
    for (int c = 0; c < m->n_channels; c++) {
        out->mean[c] = (float)imagenet_mean[c < 3 ? c : 2] * 255.0f;
        out->std[c] = (float)imagenet_std[c < 3 ? c : 2] * 255.0f;
    }
}

static int load_image(const struct source *s, const struct processor_model *m,
                      struct image_settings *out, struct error *err)
{
    *out = imagenet;
    if (!s->object) {
        default_pixels(m, out);
        return 0;
    }
    if (check_type(s, "image_processor_type", "GotOcr2ImageProcessor", err) ||
        load_pixels(s, m->n_channels, out, err) ||
        config_int(s->object, "min_patches", 1, 1024, &out->min_patches, s->file, err) ||
        config_int(s->object, "max_patches", 1, 1024, &out->max_patches, s->file, err))
        return -1;
    if (out->min_patches > out->max_patches)
        return refuse(err, s, "\"min_patches\" is larger than \"max_patches\"");
    if (out->tile_height != m->image_height || out->tile_width != m->image_width)
        return error_set(
            err, ERROR_FAILED_PRECONDITION,
            "%s: tiles are %d x %d pixels (height x width), and vision_config.image_size "
            "of config.json is %d x %d",
            s->file, out->tile_height, out->tile_width, m->image_height, m->image_width);
    return 0;
}

static int load_shift(const struct source *s, double *shift, struct error *err)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(s->object, "initial_shift");

    *shift = NAN;
    if (!item || cJSON_IsNull(item) || cJSON_IsTrue(item))
        return 0;
    *shift = cJSON_IsFalse(item) ? 0 : cJSON_IsNumber(item) ? item->valuedouble : -1;
    if (!(*shift >= 0) || !isfinite(*shift))
        return refuse(err, s, "\"initial_shift\" must be true, false or a number from 0 on");
    return 0;
}

static int load_video(const struct source *s, const struct image_settings *image, int n_channels,
                      struct video_settings *out, struct error *err)
{
    struct image_settings pixels = *image;

    *out = (struct video_settings){.initial_shift = NAN};
    if (!s->object)
        return 0;
    if (check_type(s, "video_processor_type", "InternVLVideoProcessor", err) ||
        load_pixels(s, n_channels, &pixels, err) || load_shift(s, &out->initial_shift, err) ||
        config_bool(s->object, "do_sample_frames", &out->sample, s->file, err) ||
        config_int(s->object, "num_frames", 1, 1 << 20, &out->num_frames, s->file, err) ||
        config_number(s->object, "fps", &out->fps, s->file, err))
        return -1;
    if (out->fps < 0)
        return refuse(err, s, "\"fps\" must be positive");
    if (pixels.tile_width != image->tile_width || pixels.tile_height != image->tile_height ||
        memcmp(pixels.mean, image->mean, sizeof(pixels.mean)) ||
        memcmp(pixels.std, image->std, sizeof(pixels.std)))
        return refuse(err, s,
                      "the size or the normalisation of video frames differs from that of "
                      "pictures, which is not supported");
    return 0;
}

static struct source pick(const cJSON *processor, const char *nested, const cJSON *own,
                          const char *own_name)
{
    const cJSON *object = cJSON_GetObjectItemCaseSensitive(processor, nested);

    if (cJSON_IsObject(object))
        return (struct source){.object = object, .file = "processor_config.json"};
    return (struct source){.object = own, .file = own_name};
}

static int load(struct settings *s, const struct files *f, const struct processor_model *m,
                struct error *err)
{
    const struct source own = {.object = f->processor, .file = "processor_config.json"};
    struct source image =
        pick(f->processor, "image_processor", f->image, "preprocessor_config.json");
    struct source video =
        pick(f->processor, "video_processor", f->video, "video_preprocessor_config.json");
    int seq_length = m->image_seq_length;

    if (m->n_channels < 1 || m->n_channels > SETTINGS_MAX_CHANNELS)
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "config.json: num_channels is %d; 1 to %d are supported", m->n_channels,
                         SETTINGS_MAX_CHANNELS);
    if (!video.object)
        video = (struct source){.object = f->image, .file = "preprocessor_config.json"};
    if (check_type(&own, "processor_class", "InternVLProcessor", err) ||
        config_int(own.object, "image_seq_length", 1, 1 << 20, &seq_length, own.file, err))
        return -1;
    if (seq_length != m->image_seq_length)
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "processor_config.json: \"image_seq_length\" is %d; the model makes %d "
                         "tokens of a tile",
                         seq_length, m->image_seq_length);
    return load_image(&image, m, &s->image, err) ||
                   load_video(&video, &s->image, m->n_channels, &s->video, err)
               ? -1
               : 0;
}

int settings_load(struct settings *s, const char *dir, const struct processor_model *m,
                  struct error *err)
{
    struct files f = {0};
    int rc = -1;

    *err = (struct error){0};
    f.processor = config_file_parse(dir, "processor_config.json", MAX_FILE_BYTES, err);
    if (!err->code)
        f.image = config_file_parse(dir, "preprocessor_config.json", MAX_FILE_BYTES, err);
    if (!err->code)
        f.video = config_file_parse(dir, "video_preprocessor_config.json", MAX_FILE_BYTES, err);
    if (!err->code)
        rc = load(s, &f, m, err);
    cJSON_Delete(f.processor);
    cJSON_Delete(f.image);
    cJSON_Delete(f.video);
    return rc;
}
