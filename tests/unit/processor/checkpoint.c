/*
 * The made-up checkpoint. See checkpoint.h.
 */
#include "tests/unit/processor/checkpoint.h"

#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jpeglib.h>
#include <png.h>

#include "daemon/processor/unicode.h"
#include "kernels/log.h"

const char checkpoint_template[] =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}";

const struct processor_model checkpoint_model = {.image_token_id = CHECKPOINT_IMAGE_TOKEN,
                                                 .image_seq_length = CHECKPOINT_SEQ_LENGTH,
                                                 .n_channels = 3,
                                                 .image_height = CHECKPOINT_TILE,
                                                 .image_width = CHECKPOINT_TILE};

static void path_of(const char *dir, const char *file, char path[PATH_MAX])
{
    snprintf(path, PATH_MAX, "%s/%s", dir, file);
}

static FILE *create(const char *dir, const char *file)
{
    char path[PATH_MAX];

    path_of(dir, file, path);
    FILE *f = fopen(path, "wb");

    if (!f)
        die("%s: cannot be written", path);
    return f;
}

static void finish(FILE *f)
{
    if (fclose(f))
        die("a file of the test's checkpoint cannot be written");
}

void checkpoint_write(const char *dir, const char *file, const char *text)
{
    FILE *f = create(dir, file);

    fputs(text, f);
    finish(f);
}

void checkpoint_delete(const char *dir, const char *file)
{
    char path[PATH_MAX];

    path_of(dir, file, path);
    unlink(path);
}

/* GPT-2's alphabet: the character of byte b, as JSON text. */
static void put_byte_name(FILE *f, int b)
{
    int k = 0;

    for (int i = 0; i < b; i++)
        k += !((i >= 0x21 && i <= 0x7e) || (i >= 0xa1 && i <= 0xac) || i >= 0xae);
    if ((b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae)
        fprintf(f, "\\u%04x", b);
    else
        fprintf(f, "\\u%04x", 0x100 + k);
}

static void put_byte_vocab(FILE *f)
{
    for (int b = 0; b < 256; b++) {
        fputs(b ? ", \"" : "\"", f);
        put_byte_name(f, b);
        fprintf(f, "\": %d", b);
    }
}

void checkpoint_write_vocab(const char *dir, const char *more)
{
    FILE *f = create(dir, "vocab.json");

    fputc('{', f);
    put_byte_vocab(f);
    fprintf(f, "%s}", more);
    finish(f);
}

static void write_tokenizer(const char *dir)
{
    static const char *const merged[] = {"ab", "abc", "aa", "aaaa", "\\u0120a"};
    static const char *const merges[] = {"a b", "ab c", "a a", "aa aa", "\\u0120 a"};
    static const char *const added[] = {"<|im_start|>", "<img>",   "<IMG_CONTEXT>", "</img>",
                                        "<|im_end|>",   "<video>", "<x>",           "<x>y"};
    FILE *f = create(dir, "tokenizer.json");

    fputs("{\"added_tokens\": [", f);
    for (int i = 0; i < 8; i++)
        fprintf(f,
                "%s{\"id\": %d, \"content\": \"%s\", \"single_word\": false, \"lstrip\": false, "
                "\"rstrip\": false, \"normalized\": false, \"special\": %s}",
                i ? "," : "", 300 + i, added[i], i < 6 ? "true" : "false");
    fputs(
        "], \"normalizer\": {\"type\": \"NFC\"}, \"pre_tokenizer\": {\"type\": \"Sequence\", "
        "\"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": "
        "\"(?i:'s|'t)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}| ?[^\\\\s\\\\p{L}\\\\p{N}]+"
        "[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"}, \"behavior\": \"Isolated\", "
        "\"invert\": false}, {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
        "\"use_regex\": false}]}, \"post_processor\": null, \"decoder\": {\"type\": "
        "\"ByteLevel\"}, \"model\": {\"type\": \"BPE\", \"dropout\": null, \"ignore_merges\": "
        "false, \"vocab\": {",
        f);
    put_byte_vocab(f);
    for (int i = 0; i < 5; i++)
        fprintf(f, ", \"%s\": %d", merged[i], 256 + i);
    fputs("}, \"merges\": [", f);
    for (int i = 0; i < 5; i++)
        fprintf(f, "%s\"%s\"", i ? "," : "", merges[i]);
    fputs("]}}", f);
    finish(f);
}

void checkpoint_make(char *dir)
{
    const char *tmp = getenv("TMPDIR");

    snprintf(dir, 256, "%s/internvld-test-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir))
        die("%s: cannot be made", dir);
    write_tokenizer(dir);
    checkpoint_write(dir, "chat_template.jinja", checkpoint_template);
    checkpoint_write(dir, "preprocessor_config.json",
                     "{\"image_processor_type\": \"GotOcr2ImageProcessorFast\", "
                     "\"crop_to_patches\": false, \"min_patches\": 1, \"max_patches\": 4, "
                     "\"resample\": 3, \"do_center_crop\": null, \"rescale_factor\": "
                     "0.00392156862745098, \"size\": {\"height\": 28, \"width\": 28}, "
                     "\"image_mean\": [0.485, 0.456, 0.406], \"image_std\": [0.229, 0.224, "
                     "0.225]}");
    checkpoint_write(dir, "processor_config.json",
                     "{\"image_seq_length\": 4, \"processor_class\": \"InternVLProcessor\"}");
}

void checkpoint_remove(const char *dir)
{
    DIR *d = opendir(dir);
    struct dirent *e;

    while (d && (e = readdir(d)))
        if (e->d_name[0] != '.')
            checkpoint_delete(dir, e->d_name);
    if (d)
        closedir(d);
    rmdir(dir);
}

void checkpoint_edit_tokenizer(const char *dir, const char *from, const char *to)
{
    static char text[1 << 16];
    char path[PATH_MAX];
    struct byte_buffer out = {0};

    path_of(dir, "tokenizer.json", path);
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(text, 1, sizeof(text) - 1, f) : 0;

    if (!f)
        die("%s: cannot be read", path);
    fclose(f);
    text[n] = '\0';
    char *at = strstr(text, from);

    if (!at)
        die("tokenizer.json has no %s", from);
    byte_buffer_append(&out, text, (size_t)(at - text));
    byte_buffer_append(&out, to, strlen(to));
    byte_buffer_append(&out, at + strlen(from), strlen(at + strlen(from)) + 1);
    checkpoint_write(dir, "tokenizer.json", out.data);
    byte_buffer_release(&out);
}

static uint8_t *gradient(int width, int height)
{
    uint8_t *rgb = xcalloc(3 * (size_t)width, (size_t)height);

    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++)
            for (int c = 0; c < 3; c++)
                rgb[3 * ((size_t)y * (size_t)width + (size_t)x) + (size_t)c] =
                    (uint8_t)(x * (c + 1) + 3 * y);
    return rgb;
}

uint8_t *checkpoint_png(int width, int height, size_t *n_bytes)
{
    png_image image = {.version = PNG_IMAGE_VERSION,
                       .width = (png_uint_32)width,
                       .height = (png_uint_32)height,
                       .format = PNG_FORMAT_RGB};
    uint8_t *rgb = gradient(width, height), *out;
    png_alloc_size_t n = 0;

    if (!png_image_write_to_memory(&image, NULL, &n, 0, rgb, 0, NULL))
        die("PNG: %s", image.message);
    out = xcalloc(n, 1);
    if (!png_image_write_to_memory(&image, out, &n, 0, rgb, 0, NULL))
        die("PNG: %s", image.message);
    free(rgb);
    *n_bytes = n;
    return out;
}

uint8_t *checkpoint_jpeg(int width, int height, int progressive, size_t *n_bytes)
{
    struct jpeg_compress_struct c = {0};
    struct jpeg_error_mgr errors;
    uint8_t *rgb = gradient(width, height), *out = NULL;
    unsigned long n = 0;

    c.err = jpeg_std_error(&errors);
    jpeg_create_compress(&c);
    jpeg_mem_dest(&c, &out, &n);
    c.image_width = (JDIMENSION)width;
    c.image_height = (JDIMENSION)height;
    c.input_components = 3;
    c.in_color_space = JCS_RGB;
    jpeg_set_defaults(&c);
    if (progressive)
        jpeg_simple_progression(&c);
    jpeg_start_compress(&c, TRUE);
    while (c.next_scanline < c.image_height) {
        JSAMPROW row = rgb + 3 * (size_t)width * c.next_scanline;

        jpeg_write_scanlines(&c, &row, 1);
    }
    jpeg_finish_compress(&c);
    jpeg_destroy_compress(&c);
    free(rgb);
    *n_bytes = n;
    return out;
}
