/* Question files: JSONL and TSV, quoting, base64, shared pictures, choices, what is refused. */
#include "client/eval_set.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char path[64];
static struct eval_set set;
static struct internvl_error err;

static int load(const char *extension, const char *text, size_t limit)
{
    snprintf(path, sizeof(path), "/tmp/eval-set-%d%s", (int)getpid(), extension);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    eval_set_release(&set);
    int rc = eval_set_load(&set, path, limit, SCORE_AUTO, &err);
    unlink(path);
    return rc;
}

static void lines(void **state)
{
    (void)state;
    assert_int_equal(load(".jsonl",
                          "{\"id\":\"a\",\"messages\":[],\"answer\":\"x\"}\n\n"
                          "{\"messages\":[],\"answer\":[\"x\",\"y\"],\"choices\":[\"x\",\"z\"]}\n"
                          "{\"id\":7,\"messages\":[],\"answer\":1.5,\"score\":\"number\"}\n"
                          "{\"messages\":[],\"answer\":[2,\"two\",null,3]}\n",
                          0),
                     0);
    assert_int_equal(set.n_questions, 4);
    assert_string_equal(set.questions[0].id, "a");
    assert_int_equal(set.questions[0].expected.scorer, SCORE_EXACT);
    assert_int_equal(set.questions[1].expected.n_answers, 2);
    assert_int_equal(set.questions[1].expected.scorer, SCORE_CHOICE);
    assert_int_equal(set.questions[2].expected.scorer, SCORE_NUMBER);
    assert_string_equal(set.questions[2].id, "7");
    assert_string_equal(set.questions[2].expected.answers[0], "1.5");
    assert_int_equal(set.questions[3].expected.n_answers, 3);
    assert_string_equal(set.questions[3].expected.answers[2], "3");
    assert_true(set.questions[0].key != set.questions[1].key);
}

static void table(void **state)
{
    struct command_options options = {0};
    struct conversation c = {0};
    char text[512], picture[129];
    (void)state;
    memset(picture, 'A', 128);
    picture[128] = '\0';
    snprintf(text, sizeof(text),
             "index\timage\tquestion\thint\tA\tB\tC\tanswer\tcategory\r\n"
             "1\t%s\t\"Say \"\"hi\"\"\tor\nnot\"\tnan\tyes\tno\t\tB\tfirst\r\n"
             "2\t1\tColor?\tLook.\t\t\t\tred\tsecond\n",
             picture);
    assert_int_equal(load(".tsv", text, 0), 0);
    assert_int_equal(set.n_questions, 2);
    const struct eval_question *q = &set.questions[0];
    assert_string_equal(q->question, "Say \"hi\"\tor\nnot");
    assert_string_equal(q->category, "first");
    assert_string_equal(q->hint, "");
    assert_int_equal(q->expected.n_choices, 2);
    assert_int_equal(q->expected.scorer, SCORE_CHOICE);
    char *words = eval_question_text(q);
    assert_string_equal(words,
                        "Say \"hi\"\tor\nnot\nA. yes\nB. no\nAnswer with the option's letter "
                        "from the given choices directly.");
    free(words);
    q = &set.questions[1];
    assert_int_equal(q->expected.scorer, SCORE_EXACT);
    assert_int_equal(eval_set_conversation(&set, q, &c, &options, &err), 0);
    assert_int_equal(c.messages[0].n_parts, 2);
    assert_int_equal(c.messages[0].parts[0].n_bytes, 96); /* row 1's picture */
    assert_string_equal(c.messages[0].parts[1].text,
                        "Look.\nColor?\nAnswer the question using a single word or phrase.");
    conversation_release(&c);
}

static void listed_answers(void **state)
{
    static const struct {
        const char *field, *answers[3];
    } cases[] = {{"['12 %', \"it's\" ,'a\\'b']", {"12 %", "it's", "a'b"}},
                 {"[\"one\"]", {"one"}},
                 {"['one'", {"['one'"}},
                 {"['one'] or two", {"['one'] or two"}},
                 {"[]", {"[]"}},
                 {"['a' 'b']", {"['a' 'b']"}},
                 {"[1, 2]", {"[1, 2]"}},
                 {"['x\\", {"['x\\"}}};
    char text[256];
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        snprintf(text, sizeof(text), "index\tquestion\tanswer\n1\tx\t%s\n", cases[i].field);
        assert_int_equal(load(".tsv", text, 0), 0);
        const struct eval_expected *e = &set.questions[0].expected;
        for (size_t j = 0; j < 3 && cases[i].answers[j]; j++) {
            assert_true(j < e->n_answers);
            assert_string_equal(e->answers[j], cases[i].answers[j]);
        }
        assert_true(e->n_answers == 3 || !cases[i].answers[e->n_answers]);
    }
}

static void refused(void **state)
{
    (void)state;
    assert_int_equal(load(".jsonl", "{\"messages\":[],\"answer\":true}", 0), -1);
    assert_non_null(strstr(err.msg, "\"answer\" is not a text, a number or a list of such"));
    assert_int_equal(load(".tsv", "index\tquestion\tanswer\n1\tx\n", 0), -1);
    assert_non_null(strstr(err.msg, "row 1 has 2 fields, the header has 3"));
    assert_int_equal(load(".tsv", "index\tquestion\tanswer\n1\t\tx\n", 0), -1);
    assert_int_equal(load(".tsv", "index\tquestion\tanswer\n", 0), -1);
    assert_int_equal(load(".tsv", "", 0), -1);
    assert_int_equal(load(".tsv", "a\t\"unterminated", 0), -1);
    assert_int_equal(load(".jsonl", "{\"messages\":[],\"answer\":\"1\",\"score\":\"x\"}", 0), -1);
    assert_int_equal(load(".jsonl", "{\"messages\":[],\"answer\":\"1\"}\nrest", 1), 0);
}

static void base64(void **state)
{
    static const struct {
        const char *text, *bytes;
    } right[] = {
        {"aGVsbG8=", "hello"}, {"aGVsbG8", "hello"}, {"aGV\nsbG 8h", "hello!"}, {"aA==", "h"}};
    static const char *const wrong[] = {"", "a", "aGV$bG8=", "aA==b", "====", "aG=V"};
    size_t n;
    (void)state;
    for (size_t i = 0; i < sizeof(right) / sizeof(right[0]); i++) {
        uint8_t *bytes = base64_decode(right[i].text, strlen(right[i].text), &n);
        assert_int_equal(n, strlen(right[i].bytes));
        assert_memory_equal(bytes, right[i].bytes, n);
        free(bytes);
    }
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        assert_null(base64_decode(wrong[i], strlen(wrong[i]), &n));
}

static int release(void **state)
{
    (void)state;
    eval_set_release(&set);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines),   cmocka_unit_test(table),  cmocka_unit_test(listed_answers),
        cmocka_unit_test(refused), cmocka_unit_test(base64),
    };
    return cmocka_run_group_tests_name("eval_set", tests, NULL, release);
}
