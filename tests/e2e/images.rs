//! Guests of a few instructions: how a run ends, and what the guest's serial line carries.

use std::time::Duration;

use libtest_mimic::Trial;

use super::umbra::{Way, expect_sentence, file_of, status, umbra, ways};
use crate::ensure;
use crate::support::process::End;
use crate::support::{Verdict, case, image};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let mut trials = vec![case("header_that_lies_is_refused_in_a_sentence", &[], lying_headers)];
    for way in ways() {
        let mut add = |name: &str, test: fn(Way) -> Verdict| {
            trials.push(case(format!("{}_{name}", way.name), way.needs, move || test(way)));
        };
        add("exit_port_zero_ends_with_status_0_and_v_with_2v_plus_1", exit_port);
        add("serial_bytes_come_out_unchanged_and_alone", serial);
        add("timeout_ends_a_guest_that_spins", |way| overtime(way, &image::spin()));
        add("guest_that_waits_for_ever_ends_the_run", |way| ends_by_reset(way, &image::halt()));
        add("triple_fault_ends_the_run", |way| ends_by_reset(way, &image::triple_fault()));
        add("reset_port_ends_the_run", |way| ends_by_reset(way, &image::reset_by_port()));
        add("second_cpu_starts_where_it_is_told", second_cpu);
        add("cpus_that_all_wait_for_ever_end_the_run", all_wait);
        add("random_code_ends_in_a_known_way", random_code);
    }
    trials
}

fn exit_port(way: Way) -> Verdict {
    for (value, status) in [(0, 0), (1, 3), (3, 7), (127, 255)] {
        let run = way.boot(&image::exit(value), &[])?;
        ensure!(run.end == End::Status(status), "wrote {value}, expected status {status}:\n{run}");
    }
    Ok(())
}

fn serial(way: Way) -> Verdict {
    let bytes: Vec<u8> = (0..=255).collect();
    let run = way.boot(&[image::print(&bytes), image::exit(0)].concat(), &[])?;
    ensure!(run.stdout == bytes, "{} bytes came out, and not the 256 that went in:\n{run}", run.stdout.len());
    Ok(())
}

fn overtime(way: Way, code: &[u8]) -> Verdict {
    let run = way.boot(code, &["--timeout", "300ms"])?;
    ensure!(run.end == status::TIMEOUT, "expected {:?}:\n{run}", status::TIMEOUT);
    ensure!(run.took >= Duration::from_millis(300), "it did not wait for the 300 ms:\n{run}");
    ensure!(run.took < Duration::from_secs(10), "300 ms took too long:\n{run}");
    Ok(())
}

fn ends_by_reset(way: Way, code: &[u8]) -> Verdict {
    let run = way.boot(code, &["--timeout", "20s"])?;
    ensure!(run.end == status::RESET, "expected {:?}:\n{run}", status::RESET);
    Ok(())
}

fn second_cpu(way: Way) -> Verdict {
    let code = [image::start_second_cpu(), image::exit(0)].concat();
    for vcpus in ["2", "3"] {
        let run = way.boot(&code, &["--vcpus", vcpus])?;
        ensure!(run.end == End::Status(0), "{vcpus} CPUs:\n{run}");
    }
    let run = way.boot(&code, &["--timeout", "300ms"])?;
    ensure!(run.end == status::TIMEOUT, "there is no second CPU, and yet it has answered:\n{run}");
    Ok(())
}

fn all_wait(way: Way) -> Verdict {
    let run = way.boot(&[image::start_second_cpu(), image::halt()].concat(), &["--vcpus", "4"])?;
    ensure!(run.end == status::RESET, "expected {:?}:\n{run}", status::RESET);
    Ok(())
}

/// One field of the header changed at a time, so that each check of the loader is the only one that can object.
fn lying_headers() -> Verdict {
    let good = image::multiboot(&image::exit(0));
    let lies: [(usize, u32, &str); 6] = [
        (8, 0, "checksum"),
        (12, 0x0900_0000, "header_addr before which nothing is in the file"),
        (16, 0xffff_f000, "load_addr at the end of the address space"),
        (20, 0x0000_1000, "load_end_addr before load_addr"),
        (24, 0xffff_ffff, "bss_end_addr beyond memory"),
        (28, 0x0f00_0000, "entry_addr outside the image"),
    ];
    for (offset, value, what) in lies {
        let mut bytes = good.clone();
        bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        let file = file_of(&bytes)?;
        let run = umbra(["run".as_ref(), file.path().as_os_str(), "--timeout".as_ref(), "5s".as_ref()])?;
        expect_sentence(&run, &[]).map_err(|why| format!("{what}: {}", why.message().unwrap_or_default()))?;
    }
    Ok(())
}

/// Sixty-four bytes of noise as a kernel: the run may end in any documented way, but it ends, and Umbra survives.
fn random_code(way: Way) -> Verdict {
    for seed in 1..=24u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let noise = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        let code: Vec<u8> = std::iter::repeat_with(noise).take(64).collect();
        let run = way.boot(&code, &["--timeout", "200ms"])?;
        ensure!(run.took < Duration::from_secs(20), "seed {seed}: 200 ms took too long:\n{run}");
        let by_guest = matches!(run.end, End::Status(code) if code % 2 == 1);
        let known = by_guest || [status::FAILURE, status::TIMEOUT, status::RESET].contains(&run.end);
        ensure!(known, "seed {seed}: noise cannot end this way:\n{run}");
    }
    Ok(())
}
