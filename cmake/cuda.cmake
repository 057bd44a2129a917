# The one place that decides whether the CUDA kernels are built, and for which GPUs.
#
# FLATCORE_CUDA: OFF never looks; ON demands nvcc; AUTO takes it where CMake finds it (CUDACXX, PATH, CUDA_PATH).
# FLATCORE_NVCC=pypi takes the nvcc of PyPI's packages, which pyproject.toml then requires for the build.
# Architectures: CMAKE_CUDA_ARCHITECTURES or the environment's CUDAARCHS if set; else those of the GPUs in this machine; else
# FLATCORE_DEFAULT_ARCHITECTURES. The highest is there as PTX always: a GPU that none of them serves compiles it at first use.
# flatcore_cuda_module() makes the module _cuda of the kernels under csrc/cuda/ and their bindings.

# 8.x GPUs run 8.0's machine code; 7.5 and what is newer than 9.0 compile PTX. All eight that nvcc 13 knows took 465 s on 2 cores.
set(FLATCORE_DEFAULT_ARCHITECTURES 75-virtual 80-real 90-real 90-virtual)

string(TOUPPER "${FLATCORE_CUDA}" FLATCORE_CUDA)
if(NOT FLATCORE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLATCORE_CUDA must be AUTO, ON or OFF, not '${FLATCORE_CUDA}'")
endif()

set(FLATCORE_WITH_CUDA OFF)
if(FLATCORE_NVCC STREQUAL "pypi" AND NOT FLATCORE_CUDA STREQUAL "OFF")
  execute_process(COMMAND "${Python_EXECUTABLE}" -c
    "from importlib.metadata import files; print(next(f.locate() for f in files('nvidia-cuda-nvcc') if f.name == 'nvcc'))"
    OUTPUT_VARIABLE nvcc RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed)
    message(FATAL_ERROR "FLATCORE_NVCC=pypi needs the package nvidia-cuda-nvcc, which was not found: build with pip's build "
      "isolation, or install what pyproject.toml lists for it")
  endif()
  set(CMAKE_CUDA_COMPILER "${nvcc}" CACHE FILEPATH "nvcc from PyPI" FORCE)
endif()
if(NOT FLATCORE_CUDA STREQUAL "OFF")
  find_program(FLATCORE_NVIDIA_SMI nvidia-smi)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FLATCORE_WITH_CUDA ON)
  elseif(FLATCORE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FLATCORE_CUDA=ON needs nvcc, which was not found: install the CUDA toolkit (12 or newer) and put its "
      "bin folder on PATH, or set CUDACXX to nvcc's path, or let pip bring it (FLATCORE_NVCC=pypi). FLATCORE_CUDA=AUTO builds "
      "without it.")
  else()
    find_library(FLATCORE_LIBCUDA NAMES libcuda.so.1 PATHS /usr/lib/wsl/lib)
    if(FLATCORE_NVIDIA_SMI OR FLATCORE_LIBCUDA OR EXISTS /proc/driver/nvidia)
      message(WARNING "flatcore: this machine has an NVIDIA driver but no nvcc, so the CUDA kernels are NOT built, and CUDA "
        "tensors will run on the slow PyTorch reference. To build them, with an nvcc that pip brings for the build:\n"
        "  FLATCORE_CUDA=ON FLATCORE_NVCC=pypi pip install .\n" # CMake breaks no indented line: it can be copied
        "Or install the CUDA toolkit and put nvcc on PATH. FLATCORE_CUDA=OFF leaves this out.")
    endif()
  endif()
endif()

# The architectures to build for, as CMake names them.
function(flatcore_architectures result)
  set(wanted "${CMAKE_CUDA_ARCHITECTURES}")
  if(NOT wanted)
    set(wanted "$ENV{CUDAARCHS}")
  endif()
  if(NOT wanted)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
    set(gpus "")
    if(FLATCORE_NVIDIA_SMI)
      execute_process(COMMAND "${FLATCORE_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE gpus ERROR_QUIET RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
      if(failed)
        set(gpus "")
      endif()
    endif()
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" gpus "${gpus}")
    list(TRANSFORM gpus REPLACE "\\." "")
    list(REMOVE_DUPLICATES gpus)
    foreach(gpu IN LISTS gpus)
      if(known MATCHES "compute_${gpu}[^0-9a-z]") # an older nvcc leaves a newer GPU to PTX
        list(APPEND wanted "${gpu}-real")
      endif()
    endforeach()
  endif()
  if(NOT wanted)
    set(wanted "${FLATCORE_DEFAULT_ARCHITECTURES}")
  endif()
  if(wanted MATCHES "^[0-9]+(-real|-virtual)?(;[0-9]+(-real|-virtual)?)*$")
    set(highest 0)
    foreach(architecture IN LISTS wanted)
      string(REGEX MATCH "^[0-9]+" number "${architecture}")
      if(number GREATER highest)
        set(highest ${number})
      endif()
    endforeach()
    if(NOT "${highest}" IN_LIST wanted AND NOT "${highest}-virtual" IN_LIST wanted)
      list(APPEND wanted "${highest}-virtual")
    endif()
  endif()
  set(${result} "${wanted}" PARENT_SCOPE)
endfunction()

if(FLATCORE_WITH_CUDA)
  flatcore_architectures(CMAKE_CUDA_ARCHITECTURES)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static) # the module imports where there is no driver
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  file(GLOB FLATCORE_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
  string(REPLACE ";" " " FLATCORE_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
endif()

function(flatcore_cuda_module)
  # No fast-math and no per-thread default stream: NaN has to survive, and torch's stream is handed over by address.
  add_library(cuda_kernels OBJECT ${FLATCORE_CUDA_SOURCES})
  target_include_directories(cuda_kernels PRIVATE csrc)
  target_compile_definitions(cuda_kernels PRIVATE FLATCORE_CUDA_ARCHITECTURES="${FLATCORE_ARCHITECTURES}")
  target_compile_options(cuda_kernels PRIVATE -Xcompiler=-Wall,-Wextra)
  if(FLATCORE_WERROR)
    target_compile_options(cuda_kernels PRIVATE -Werror all-warnings)
  endif()
  flatcore_module(_cuda csrc/bind/cuda_module.cpp csrc/bind/cuda.cpp csrc/bind/cuda_head.cpp
    csrc/bind/cuda_head_measure.cpp csrc/bind/exchange.cpp csrc/bind/head_problem.cpp $<TARGET_OBJECTS:cuda_kernels>)
endfunction()
message(STATUS "flatcore: FLATCORE_CUDA=${FLATCORE_CUDA}, CUDA kernels: ${FLATCORE_WITH_CUDA} ${FLATCORE_ARCHITECTURES}")
