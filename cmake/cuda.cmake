# The one place that decides whether the module is built with CUDA.
#
# flatcore_cuda(<target>) adds the kernels under csrc/cuda/ to the target and defines FLATCORE_WITH_CUDA.

string(TOUPPER "${FLATCORE_CUDA}" FLATCORE_CUDA)
if(NOT FLATCORE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLATCORE_CUDA must be AUTO, ON or OFF, not '${FLATCORE_CUDA}'")
endif()

set(FLATCORE_WITH_CUDA OFF)
file(GLOB FLATCORE_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
if(FLATCORE_CUDA STREQUAL "ON" AND NOT FLATCORE_CUDA_SOURCES)
  message(FATAL_ERROR "FLATCORE_CUDA=ON, but this version of flatcore has no CUDA kernels yet. "
    "Build with FLATCORE_CUDA=OFF: CUDA tensors then run on the PyTorch reference, on their own device.")
endif()

function(flatcore_cuda target)
  target_compile_definitions(${target} PRIVATE FLATCORE_WITH_CUDA=$<BOOL:${FLATCORE_WITH_CUDA}>)
endfunction()
message(STATUS "flatcore: FLATCORE_CUDA=${FLATCORE_CUDA}, CUDA kernels: ${FLATCORE_WITH_CUDA}")
