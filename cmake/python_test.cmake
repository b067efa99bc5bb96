# A test in Python against the real programs. Skipped (status 77) where a Python package is missing; deploy/test.sh
# makes an environment that has them.
set(INTERNVLD_PYTHON python3 CACHE STRING "Python with the packages of tests/requirements.txt")

# internvld_python_test(NAME LABEL SCRIPT [ARGUMENT...])
function(internvld_python_test name label script)
  add_test(NAME ${name} COMMAND ${INTERNVLD_PYTHON} ${PROJECT_SOURCE_DIR}/tests/gateway/run.py ${script} ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS "${label}" SKIP_RETURN_CODE 77 TIMEOUT 1200 PROCESSORS 2)
  set_property(TEST ${name} PROPERTY ENVIRONMENT
    INTERNVLD_DAEMON=$<TARGET_FILE:internvld>
    INTERNVLD_COMMAND=$<TARGET_FILE:internvl>
    INTERNVLD_CLIENT_TEST=$<TARGET_FILE:gateway_client_test>
    INTERNVLD_SANITIZED=${INTERNVLD_SANITIZE}
    PYTHONDONTWRITEBYTECODE=1)
endfunction()
