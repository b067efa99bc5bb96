"""The installed manual pages and shell completion name exactly the options that --help does, both ways. And a program
in C is built against the installed client library, found by pkg-config.

    test_manual.py CMAKE BUILD

Installs BUILD into a folder of its own and looks at that. The pages also go through groff, where there is one,
whose warnings are failures."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

PREFIX = "usr"


def say(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def help_options(program, *command):
    """Lines that begin an option: two or four blanks, its names, at most one argument."""
    return set(re.findall(r"^ {2,4}(--[a-z][a-z-]*)", say(program, *command, "--help"), re.M))


def help_commands(program):
    return re.findall(r"^  ([a-z]+)  ", say(program, "--help"), re.M)


CLIENT = r"""
#include <internvl_client.h>
#include <stdio.h>

int main(void)
{
    struct internvl_error err = {0};
    struct internvl_client *c = internvl_connect(&(struct internvl_options){.address = "unix:/nowhere"}, &err);
    struct internvl_generate_request request = {.prompt = {.token_ids = (uint32_t[]){1}, .n_token_ids = 1}};
    int rc = internvl_generate(c, &request, NULL, NULL, NULL, &err);
    internvl_close(c);
    printf("%s %d %s\n", internvl_version(), rc, internvl_code_name(err.code));
    return 0;
}
"""


class Manual(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.root = pathlib.Path(cls.folder.name)
        subprocess.run([CMAKE, "--install", BUILD, "--prefix", f"/{PREFIX}"], check=True,
                       env={**os.environ, "DESTDIR": str(cls.root)}, stdout=subprocess.DEVNULL)
        cls.share = cls.root / PREFIX / "share"
        cls.daemon, cls.client = (cls.root / PREFIX / "bin" / x for x in ("internvld", "internvl"))

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def page(self, name):
        return (self.share / "man/man1" / f"{name}.1").read_text()

    def page_options(self, name):
        """Of the section OPTIONS: a tag that begins with an option."""
        text = self.page(name).split(".SH OPTIONS\n")[1].split("\n.SH ")[0].replace("\\-", "-")
        return set(re.findall(r'^\.TP\n\.B "(--[a-z][a-z-]*)', text, re.M))

    def completed(self, program, *words):
        script = 'source "$1"; shift; COMP_WORDS=("$@" "--"); COMP_CWORD=$#; _internvl; printf "%s\\n" "${COMPREPLY[@]}"'
        return set(say("bash", "-c", script, "bash", self.share / "bash-completion/completions" / program.name,
                       program, *words).split())

    @unittest.skipIf(os.environ.get("INTERNVLD_SANITIZED"), "the library would need the sanitizer's options too")
    def test_client_library(self):
        folder, = self.root.glob(f"{PREFIX}/lib*/**/pkgconfig")
        options = subprocess.run(["pkg-config", "--cflags", "--libs", "internvl"], check=True, capture_output=True,
                                 text=True, env={**os.environ, "PKG_CONFIG_PATH": str(folder)}).stdout.split()
        source, program = self.root / "client.c", self.root / "client"
        source.write_text(CLIENT)
        say("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", source, *options, "-o", program)
        self.assertRegex(say(program), r"^\d+\.\d+\.\d+ -1 UNAVAILABLE$")

    def test_daemon(self):
        options = help_options(self.daemon)
        self.assertGreater(len(options), 20)
        self.assertEqual(self.page_options("internvld"), options)
        self.assertEqual(self.completed(self.daemon), options)

    def test_client(self):
        commands = help_commands(self.client)
        self.assertGreater(len(commands), 5)
        all_options, page = set(), self.page("internvl").replace("\\-", "-")
        tags = dict(re.findall(r'^\.TP\n\.B "(--[a-z-]+).*"\n.*\nOf(?: every command|: (.*))\.$', page, re.M))
        for command in commands:
            options = help_options(self.client, command)
            all_options |= options
            self.assertEqual(self.completed(self.client, command), options, command)
            of_command = {o for o, names in tags.items() if not names or command in names.split(", ")}
            self.assertEqual(of_command, options, command)
            self.assertIn(f'.SS "internvl {command} ', page)
        self.assertEqual(self.page_options("internvl"), all_options)

    def test_commands_are_completed(self):
        script = 'source "$1"; COMP_WORDS=("$2" ""); COMP_CWORD=1; _internvl; printf "%s\\n" "${COMPREPLY[@]}"'
        completion = self.share / "bash-completion/completions/internvl"
        self.assertEqual(say("bash", "-c", script, "bash", completion, self.client).split(),
                         help_commands(self.client))

    def test_pages_are_sound(self):
        for name in ("internvld", "internvl"):
            self.assertNotIn("@", re.sub(r"@[a-z]", "", self.page(name)), "a placeholder is left")
            if not shutil.which("groff"):
                print("groff is not installed: warnings are not looked at")
                continue
            done = subprocess.run(["groff", "-k", "-man", "-Tutf8", "-ww", str(self.share / f"man/man1/{name}.1")],
                                  capture_output=True, text=True)
            self.assertEqual(done.stderr, "")

    def test_unit_and_its_settings(self):
        unit = (self.root / PREFIX / "lib/systemd/system/internvld.service").read_text()
        self.assertIn("EnvironmentFile=/etc/default/internvld\n", unit)
        settings = (self.root / "etc/default/internvld").read_text()
        words = re.search(r'^INTERNVLD_OPTIONS="(.*)"$', settings, re.M)[1].split()
        self.assertLessEqual({w for w in words if w.startswith("--")}, help_options(self.daemon))


if __name__ == "__main__":
    CMAKE, BUILD = sys.argv[1:3]
    unittest.main(argv=sys.argv[:1], verbosity=2)
