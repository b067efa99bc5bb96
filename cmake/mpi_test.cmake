# Tests that run as one MPI job: add_mpi_test(NAME comm RANKS 1 2 4 8 COMMAND target [args…] [LABELS mpi] [TIMEOUT s])
# adds a test NAME.N for each N. Ranks may outnumber the cores. Exit 77 is a skip.
include_guard(GLOBAL)

# Also for tests that start mpirun themselves. In the cache, because folders do not share variables.
set(INTERNVLD_MPIRUN_FLAGS
  --oversubscribe --allow-run-as-root --bind-to none --quiet
  --mca btl self,vader --mca btl_vader_single_copy_mechanism none --mca oob_tcp_if_include lo
  --mca mpi_yield_when_idle 1 --mca odls_base_sigkill_timeout 0
  CACHE INTERNAL "arguments of mpirun in tests")

function(add_mpi_test)
  cmake_parse_arguments(arg "" "NAME;TIMEOUT" "RANKS;COMMAND;LABELS" ${ARGN})
  if(NOT arg_LABELS)
    set(arg_LABELS mpi)
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  list(POP_FRONT arg_COMMAND target)
  foreach(n ${arg_RANKS})
    add_test(NAME ${arg_NAME}.${n}
      COMMAND ${MPIEXEC_EXECUTABLE} -n ${n} ${INTERNVLD_MPIRUN_FLAGS} $<TARGET_FILE:${target}> ${arg_COMMAND})
    set_tests_properties(${arg_NAME}.${n} PROPERTIES
      LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT} SKIP_RETURN_CODE 77 PROCESSORS 2)
  endforeach()
endfunction()
