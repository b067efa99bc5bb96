# Warnings are errors in our own files; generated and third-party code does not get these flags.
add_library(internvld_flags INTERFACE)
target_compile_options(internvld_flags INTERFACE
  -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Wstrict-prototypes -Wmissing-prototypes -Werror
  -fno-math-errno -ffp-contract=off)
# -ffp-contract=off: a fused multiply-add is written where it is meant, so that two compilers give the same bits.
if(INTERNVLD_SANITIZE)
  add_compile_options(-fsanitize=${INTERNVLD_SANITIZE} -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${INTERNVLD_SANITIZE})
endif()
