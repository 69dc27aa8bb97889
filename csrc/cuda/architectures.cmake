# Which GPUs the CUDA kernels are compiled for, and a line to the user about how long that takes.

# Sets CMAKE_CUDA_ARCHITECTURES unless the user has chosen (CUDAARCHS in the environment). By
# default: the GPUs of this machine, each also as PTX for newer ones; where none is seen, all that
# this nvcc knows of our list, the newest also as PTX.
macro(autodrop_choose_architectures)
  if(NOT CMAKE_CUDA_ARCHITECTURES AND "$ENV{CUDAARCHS}" STREQUAL "")
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch
                    OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE seen ERROR_QUIET RESULT_VARIABLE failed)
    if(failed)  # there is no nvidia-smi, or no driver
      set(seen "")
    endif()
    string(REGEX MATCHALL "[0-9]+[.][0-9]+" seen "${seen}")
    list(REMOVE_DUPLICATES seen)
    foreach(arch ${seen})
      string(REPLACE "." "" arch ${arch})
      if(known MATCHES "compute_${arch}(\n|$)")
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch})
      else()  # this nvcc is older than a GPU here: its newest PTX may serve that one
        set(CMAKE_CUDA_ARCHITECTURES "")
        break()
      endif()
    endforeach()
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      foreach(arch 80 86 89 90 100 103 120)
        if(known MATCHES "compute_${arch}(\n|$)")
          list(APPEND CMAKE_CUDA_ARCHITECTURES "${arch}-real")
          set(newest ${arch})
        endif()
      endforeach()
      list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
    endif()
  endif()
endmacro()

# pip keeps a build's output to itself, so this goes to the terminal, where there is one.
function(autodrop_announce)
  list(LENGTH CMAKE_CUDA_ARCHITECTURES count)
  cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
  # 10 seconds for each architecture on one core, and 20 for everything else.
  math(EXPR minutes "(20 + 10 * ${count} / ${cores} + 59) / 60")
  string(CONCAT line "autodrop_ext: compiling CUDA kernels for ${count} GPU architectures takes "
                     "about ${minutes} min on ${cores} cores. CUDAARCHS=native, or a number such as "
                     "90, compiles for one GPU; AUTODROP_CUDA=0 compiles none.")
  message(STATUS "${line}")
  execute_process(COMMAND sh -c "printf '\\n%s\\n' \"$1\" > /dev/tty" sh "${line}"
                  OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE unused)
endfunction()
