# A test in Python against the real programs. Skipped (status 77) where a Python package is missing; deploy/test.sh
# makes an environment that has them.
set(INTERNVLD_PYTHON python3 CACHE STRING "Python with the packages of tests/requirements.txt")

# internvld_program_test(NAME LABEL COMMAND...): a test that starts the real programs. What compares answers may have
# another test beside it (deploy/test.sh runs two at a time); what looks at times or lost ranks may not.
function(internvld_program_test name label)
  set(processors 2)
  if(label MATCHES "parity|invariance|cuda-emulated")
    set(processors 1)
  endif()
  add_test(NAME ${name} COMMAND ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS "${label}" SKIP_RETURN_CODE 77 TIMEOUT 1200 PROCESSORS ${processors})
  set_property(TEST ${name} PROPERTY ENVIRONMENT
    INTERNVLD_DAEMON=$<TARGET_FILE:internvld>
    INTERNVLD_COMMAND=$<TARGET_FILE:internvl>
    INTERNVLD_CLIENT_TEST=$<TARGET_FILE:gateway_client_test>
    INTERNVLD_SANITIZED=${INTERNVLD_SANITIZE}
    PYTHONDONTWRITEBYTECODE=1)
endfunction()

# internvld_python_test(NAME LABEL SCRIPT [ARGUMENT...])
set(INTERNVLD_RUN_SCRIPT ${INTERNVLD_PYTHON} ${PROJECT_SOURCE_DIR}/tests/gateway/run.py)
function(internvld_python_test name label)
  internvld_program_test(${name} "${label}" ${INTERNVLD_RUN_SCRIPT} ${ARGN})
endfunction()

# internvld_isa_tests(NAME LABEL ISAS COMMAND...): NAME_ISA for each instruction set of the CPU, forced. A build with a
# sanitizer has op_test for that, which goes through them all.
set(INTERNVLD_VECTOR_ISAS avx2 avx512 avx512bf16 avx512bf16fma)
function(internvld_isa_tests name label isas)
  if(NOT INTERNVLD_SANITIZE)
    foreach(isa ${isas})
      internvld_program_test(${name}_${isa} "${label}" sh ${PROJECT_SOURCE_DIR}/tests/force_isa.sh ${isa} ${ARGN})
    endforeach()
  endif()
endfunction()
