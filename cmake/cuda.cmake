# The one place that decides whether the module is built with CUDA, and for which GPUs.
#
# FLATCORE_CUDA: OFF never looks; ON demands nvcc; AUTO takes it where CMake finds it (CUDACXX, PATH, CUDA_PATH).
# FLATCORE_NVCC=pypi takes the nvcc of PyPI's packages, which pyproject.toml then requires for the build.
# Architectures: CMAKE_CUDA_ARCHITECTURES or the environment's CUDAARCHS if set; else those of the GPUs in this machine; else
# 75 to 90 and whatever newer ones the toolkit knows, the last as PTX too, which newer GPUs compile when they load it.
# flatcore_cuda(<target>) adds the kernels under csrc/cuda/ to the target and defines FLATCORE_WITH_CUDA.

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
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FLATCORE_WITH_CUDA ON)
  elseif(FLATCORE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FLATCORE_CUDA=ON needs nvcc, which was not found: install the CUDA toolkit (12 or newer) and put its "
      "bin folder on PATH, or set CUDACXX to nvcc's path. FLATCORE_CUDA=AUTO builds without it.")
  endif()
endif()

if(FLATCORE_WITH_CUDA)
  if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(gpus "")
    find_program(FLATCORE_NVIDIA_SMI nvidia-smi)
    if(FLATCORE_NVIDIA_SMI)
      execute_process(COMMAND "${FLATCORE_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE gpus ERROR_QUIET RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
      if(failed)
        set(gpus "")
      endif()
    endif()
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" gpus "${gpus}")
    if(gpus)
      string(REPLACE "." "" gpus "${gpus}")
      list(REMOVE_DUPLICATES gpus)
      list(TRANSFORM gpus APPEND "-real")
      set(CMAKE_CUDA_ARCHITECTURES "${gpus}")
    else()
      execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
      string(REGEX MATCHALL "compute_[0-9]+" known "${known}")
      list(TRANSFORM known REPLACE "compute_" "")
      list(REMOVE_DUPLICATES known)
      list(SORT known COMPARE NATURAL)
      set(CMAKE_CUDA_ARCHITECTURES "75-virtual")
      foreach(architecture IN LISTS known)
        if(architecture MATCHES "^(80|86|89|90)$" OR (architecture GREATER 90 AND architecture MATCHES "0$"))
          list(APPEND CMAKE_CUDA_ARCHITECTURES "${architecture}-real")
          set(newest "${architecture}")
        endif()
      endforeach()
      if(newest)
        list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
      endif()
    endif()
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static) # the module imports where there is no driver
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  file(GLOB FLATCORE_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
  string(REPLACE ";" " " FLATCORE_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
endif()

function(flatcore_cuda target)
  target_compile_definitions(${target} PRIVATE FLATCORE_WITH_CUDA=$<BOOL:${FLATCORE_WITH_CUDA}>)
  if(NOT FLATCORE_WITH_CUDA)
    return()
  endif()
  # No fast-math and no per-thread default stream: NaN has to survive, and torch's stream is handed over by address.
  add_library(cuda_kernels OBJECT ${FLATCORE_CUDA_SOURCES})
  target_include_directories(cuda_kernels PRIVATE csrc)
  target_compile_definitions(cuda_kernels PRIVATE FLATCORE_CUDA_ARCHITECTURES="${FLATCORE_ARCHITECTURES}")
  target_compile_options(cuda_kernels PRIVATE -Werror all-warnings -Xcompiler=-Wall,-Wextra)
  target_sources(${target} PRIVATE csrc/bind/cuda.cpp csrc/bind/cuda_head.cpp $<TARGET_OBJECTS:cuda_kernels>)
endfunction()
message(STATUS "flatcore: FLATCORE_CUDA=${FLATCORE_CUDA}, CUDA kernels: ${FLATCORE_WITH_CUDA} ${FLATCORE_ARCHITECTURES}")
