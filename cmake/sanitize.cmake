# Instrumented builds, for the presets: FLATCORE_SANITIZE=address (undefined behaviour too) or thread. A finding ends the run.
#
# address: the extension goes to <build>/flatcore, and ctest runs a slice of the pytest suite on it, under a Python with the
#   sanitizer's runtime preloaded. The kernels are instrumented, the binding is not (four fifths of what its build would take).
#   Leaks are not looked for: what would be found is Python's and torch's.
# thread: tests/sanitize/threads.cpp, eight threads over kernels of one thread each. Without Python, and without a team of
#   OpenMP: its library is not instrumented, so that each of its barriers would look like a race.

option(FLATCORE_BASELINE_ONLY "Compile no CPU target but the baseline, in a third of the time" OFF)
set(FLATCORE_SANITIZE_FLAGS "")
if(NOT FLATCORE_SANITIZE MATCHES "^(|address|thread)$")
  message(FATAL_ERROR "FLATCORE_SANITIZE must be address, thread or empty, not '${FLATCORE_SANITIZE}'")
endif()
if(FLATCORE_SANITIZE)
  enable_testing()
  # after -O3, which takes twice as long to compile; GCC's warnings of uninitialised values are false in instrumented code
  set(FLATCORE_SANITIZE_FLAGS -O1 -g -fno-omit-frame-pointer -fsanitize=${FLATCORE_SANITIZE} -Wno-maybe-uninitialized)
endif()
if(FLATCORE_SANITIZE STREQUAL "address")
  # null and object-size: the address sanitizer sees what they see, and without them compiling takes 12 s a file, not 26
  list(APPEND FLATCORE_SANITIZE_FLAGS -fsanitize=undefined,float-cast-overflow -fno-sanitize=vptr,null,object-size
    -fno-sanitize-recover=all)
  find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

function(flatcore_threads_driver)
  add_executable(threads tests/sanitize/threads.cpp csrc/cpu/targets.cpp csrc/cpu/parallel.cpp ${FLATCORE_OBJECTS})
  target_include_directories(threads PRIVATE csrc)
  target_compile_options(threads PRIVATE ${FLATCORE_FLAGS} ${FLATCORE_SANITIZE_FLAGS})
  target_link_options(threads PRIVATE -fsanitize=thread)
  target_link_libraries(threads PRIVATE OpenMP::OpenMP_CXX)
  add_test(NAME threads COMMAND threads)
  set_tests_properties(threads PROPERTIES ENVIRONMENT "TSAN_OPTIONS=halt_on_error=1")
endfunction()

function(flatcore_sanitized_tests)
  set_target_properties(_core PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/flatcore")
  target_compile_options(_core PRIVATE -O0)
  target_link_options(_core PRIVATE -fsanitize=address,undefined)
  # libstdc++ as well: the runtime looks for __cxa_throw before torch brings it
  foreach(library IN ITEMS libasan.so libstdc++.so)
    execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=${library} OUTPUT_VARIABLE path
      OUTPUT_STRIP_TRAILING_WHITESPACE)
    list(APPEND preloaded "${path}")
  endforeach()
  list(JOIN preloaded ":" preloaded)
  list(JOIN FLATCORE_CPU_TARGETS " or " targets)
  add_test(NAME extension COMMAND "${Python_EXECUTABLE}" -c
    "import sys; from flatcore import _core; sys.exit(not _core.__file__.startswith(sys.argv[1]) and _core.__file__)"
    "${CMAKE_BINARY_DIR}/")
  # the sanitizers write to the file descriptor that pytest would keep to itself
  add_test(NAME kernels COMMAND "${Python_EXECUTABLE}" -m pytest -p no:cacheprovider --capture=sys -q -k "${targets}"
    tests/test_edges.py tests/test_shapes.py tests/test_head_metrics.py tests/test_head_metrics_backward.py
    tests/test_row_norms.py tests/test_unmasked_cross_entropy.py)
  set_tests_properties(extension kernels PROPERTIES WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}" ENVIRONMENT
    "LD_PRELOAD=${preloaded};ASAN_OPTIONS=detect_leaks=0;UBSAN_OPTIONS=print_stacktrace=1;PYTHONPATH=${CMAKE_BINARY_DIR}")
endfunction()
