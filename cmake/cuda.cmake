# The CUDA back end, in three forms of one set of sources:
#   internvld_cuda           what the daemon links: the real thing with INTERNVLD_CUDA=ON, else cuda_absent.c
#   cuda_real                nvcc's objects, their register table and the test program for a machine with a GPU; never
#                            part of the default build
#   internvld_cuda_emulated  tests/cuda_emulation
# INTERNVLD_CUDA: AUTO offers cuda_real where nvcc is found; ON demands the toolkit and NCCL; OFF looks for nothing.
set(INTERNVLD_CUDA AUTO CACHE STRING "AUTO, ON or OFF")
set(INTERNVLD_CUDA_ARCHITECTURES 80 90a 100 120 CACHE STRING "sm_ numbers that the device code is compiled for")
set(INTERNVLD_CUDA_SOURCES backend rows matmul quantized codes fp8 paged vision top_k draw all_reduce)

if(NOT INTERNVLD_CUDA STREQUAL OFF)
  find_program(NVCC nvcc PATHS /usr/local/cuda/bin)
  if(NVCC)
    get_filename_component(cuda_root ${NVCC} REALPATH)
    get_filename_component(cuda_root ${cuda_root} DIRECTORY)
    get_filename_component(cuda_root ${cuda_root} DIRECTORY)
    find_path(CUDA_INCLUDE_DIR cuda_runtime.h PATHS ${cuda_root}/include NO_DEFAULT_PATH)
    find_library(CUDART_LIBRARY cudart PATHS ${cuda_root}/lib64 ${cuda_root}/lib NO_DEFAULT_PATH)
    find_library(CUBLASLT_LIBRARY cublasLt PATHS ${cuda_root}/lib64 ${cuda_root}/lib NO_DEFAULT_PATH)
    find_path(NCCL_INCLUDE_DIR nccl.h PATHS ${cuda_root}/include)
    find_library(NCCL_LIBRARY nccl PATHS ${cuda_root}/lib64 ${cuda_root}/lib)
  endif()
endif()
if(NVCC AND CUDA_INCLUDE_DIR AND CUDART_LIBRARY AND CUBLASLT_LIBRARY AND NCCL_INCLUDE_DIR AND NCCL_LIBRARY)
  set(INTERNVLD_CUDA_FOUND ON)
  message(STATUS "CUDA: ${NVCC}; target cuda_real compiles the back end")
elseif(INTERNVLD_CUDA STREQUAL ON)
  message(FATAL_ERROR "INTERNVLD_CUDA=ON: nvcc, cudart, cublasLt or NCCL not found")
else()
  message(STATUS "CUDA: no toolkit with cublasLt and NCCL, building without it")
endif()

add_library(internvld_cuda_absent STATIC EXCLUDE_FROM_ALL
  ${CMAKE_SOURCE_DIR}/kernels/cuda_absent.c ${CMAKE_SOURCE_DIR}/parallel/comm_nccl_absent.c)
target_link_libraries(internvld_cuda_absent PUBLIC internvld_kernels internvld_parallel PRIVATE internvld_flags)

add_library(internvld_cuda INTERFACE)
if(INTERNVLD_CUDA STREQUAL ON)
  target_link_libraries(internvld_cuda INTERFACE internvld_cuda_real)
else()
  target_link_libraries(internvld_cuda INTERFACE internvld_cuda_absent)
endif()

if(INTERNVLD_CUDA_FOUND)
  foreach(architecture ${INTERNVLD_CUDA_ARCHITECTURES})
    list(APPEND gencode -gencode arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  foreach(name ${INTERNVLD_CUDA_SOURCES})
    set(source ${CMAKE_SOURCE_DIR}/kernels/cuda_${name}.cu)
    set(object ${CMAKE_BINARY_DIR}/cuda_real/cuda_${name}.o)
    add_custom_command(OUTPUT ${object} ${object}.log
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda_real
      # -fmad=false: a fused multiply-add is written where it is meant, as in warnings.cmake.
      COMMAND sh ${CMAKE_SOURCE_DIR}/kernels/cuda_compile.sh ${object}.log
              ${NVCC} -std=c++17 -O3 -fmad=false -lineinfo -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror
              -Xptxas -v ${gencode} -I${CMAKE_SOURCE_DIR} -D_GNU_SOURCE -MD -MF ${object}.d -c ${source} -o ${object}
      DEPENDS ${source} ${CMAKE_SOURCE_DIR}/kernels/cuda_compile.sh
      DEPFILE ${object}.d
      COMMENT "nvcc cuda_${name}.cu"
      VERBATIM)
    list(APPEND cuda_objects ${object})
    list(APPEND cuda_logs ${object}.log)
  endforeach()
  add_library(internvld_cuda_real STATIC EXCLUDE_FROM_ALL
    ${cuda_objects} ${CMAKE_SOURCE_DIR}/parallel/comm_nccl.c ${CMAKE_SOURCE_DIR}/parallel/comm_ipc.c)
  target_include_directories(internvld_cuda_real SYSTEM PRIVATE ${CUDA_INCLUDE_DIR} ${NCCL_INCLUDE_DIR})
  target_link_libraries(internvld_cuda_real
    PUBLIC internvld_kernels internvld_parallel ${CUBLASLT_LIBRARY} ${CUDART_LIBRARY} ${NCCL_LIBRARY} stdc++
    PRIVATE internvld_flags)
  add_custom_target(cuda_real
    COMMAND sh ${CMAKE_SOURCE_DIR}/kernels/cuda_registers.sh ${cuda_logs}
    DEPENDS internvld_cuda_real
    VERBATIM)
endif()
