//! Races between threads of a launch, between operations, and with `cp.async`; and what is none.

use super::*;

fn both() -> [Launch; 2] {
    let mut shared = Launch::shared();
    shared
        .store(
            by(3),
            &(0..16).map(|lane| (lane, u64::from(lane) * 4)).collect::<Vec<_>>(),
            &[[0; 16]; 32],
        )
        .unwrap();
    shared.clocks.barrier(0, 0, 0b1111);
    [Launch::global(4096), shared]
}

#[test]
fn a_barrier_is_what_keeps_writer_and_reader_apart() {
    for mut launch in both() {
        launch.write(by(0).inst(10), 8).unwrap();
        let f = fault(
            launch.read(by(1).inst(11), 8),
            Class::Race,
            &["lane 0 of warp 1", "lane 0 of warp 0 in block 0 wrote it at inst #10"],
        );
        assert_eq!((f.other_inst, f.lane), (Some(10), Some(0)));
        launch.read(by(1), 12).unwrap();
        launch.clocks.barrier(0, 0, 0b11);
        launch.read(by(1), 8).unwrap();
        fault(launch.read(by(2), 8), Class::Race, &[]);
    }
}

#[test]
fn a_write_after_a_read_needs_a_barrier_too() {
    for mut launch in both() {
        launch.read(by(0).inst(5), 8).unwrap();
        launch.read(by(1).inst(6), 8).unwrap();
        fault(launch.write(by(1), 8), Class::Race, &["warp 0 in block 0 read it at inst #5"]);
        launch.clocks.barrier(0, 0, 0b1111);
        launch.write(by(1), 8).unwrap();
        fault(launch.write(by(2), 8), Class::Race, &["wrote"]);
    }
}

#[test]
fn readers_do_not_race_and_any_of_many_is_remembered() {
    for mut launch in both() {
        for warp in [0, 1, 2, 3, 2, 1, 0] {
            launch.load(by(warp), &(0..16).map(|lane| (lane, 8)).collect::<Vec<_>>()).unwrap();
        }
        for warp in 0..4 {
            fault(launch.write(by(warp), 8), Class::Race, &["read"]);
        }
    }
}

#[test]
fn of_three_readers_those_of_different_warps_are_kept() {
    for mut launch in both() {
        launch.read(by(0), 8).unwrap();
        launch.load(by(1), &[(0, 8), (1, 8)]).unwrap();
        launch.clocks.warp_sync(1);
        fault(launch.write(by(1), 8), Class::Race, &["warp 0 in block 0 read it"]);
    }
}

#[test]
fn lanes_of_a_warp_need_a_warp_sync() {
    for mut launch in both() {
        launch.write(by(0), 8).unwrap();
        launch.read(by(0), 8).unwrap();
        launch.write(by(0), 8).unwrap();
        fault(
            launch.load(by(0), &[(1, 8)]),
            Class::Race,
            &["lane 1 of warp 0", "lane 0 of warp 0"],
        );
        launch.clocks.warp_sync(0);
        launch.load(by(0), &[(1, 8)]).unwrap();
        fault(launch.write(by(0), 8), Class::Race, &["lane 1 of warp 0 in block 0 read it"]);
    }
}

#[test]
fn a_fence_or_another_warps_sync_orders_no_lanes() {
    for mut launch in both() {
        launch.write(by(0), 8).unwrap();
        launch.clocks.fence(0, Scope::Device);
        launch.clocks.warp_sync(1);
        fault(launch.load(by(0), &[(1, 8)]), Class::Race, &[]);
    }
}

#[test]
fn lanes_of_one_store_may_only_agree() {
    for mut launch in both() {
        let lanes: Vec<(u32, u64)> = (0..8).map(|lane| (lane, 8)).collect();
        launch.store(by(0), &lanes, &[[3; 16]; 32]).unwrap();
        launch.clocks.warp_sync(0);
        let mut values = [[3; 16]; 32];
        values[5] = [4; 16];
        let f = fault(
            launch.store(by(0), &lanes, &values),
            Class::Race,
            &["lane 5", "lane 0 of warp 0"],
        );
        assert_eq!(f.lane, Some(5));
    }
}

#[test]
fn the_same_store_in_the_next_round_of_a_loop_is_another_one() {
    for mut launch in both() {
        launch.store(by(0), &[(1, 8)], &[[3; 16]; 32]).unwrap();
        fault(launch.store(by(0), &[(0, 8)], &[[3; 16]; 32]), Class::Race, &["lane 1"]);
        fault(launch.store(by(0), &[(0, 8), (1, 8)], &[[3; 16]; 32]), Class::Race, &["lane 1"]);
    }
}

#[test]
fn neighbouring_halves_and_bytes_of_a_word_are_apart() {
    for mut launch in both() {
        let halves: Vec<(u32, u64)> = (0..8).map(|lane| (lane, u64::from(lane) * 2)).collect();
        launch.store(by(0).width(2), &halves, &[[1; 16]; 32]).unwrap();
        launch.store(by(1).width(1), &[(0, 17), (1, 19)], &[[1; 16]; 32]).unwrap();
        launch.store(by(2).width(1), &[(0, 16), (1, 18)], &[[1; 16]; 32]).unwrap();
        launch.clocks.warp_sync(2);
        fault(
            launch.store(by(2).width(2), &[(0, 18)], &[[1; 16]; 32]),
            Class::Race,
            &["lane 1 of warp 1"],
        );
        fault(launch.read(by(1), 0), Class::Race, &["lane 0 of warp 0"]);
        launch.clocks.barrier(0, 0, 0b111);
        launch.load(by(1).width(16), &[(0, 0), (1, 0)]).unwrap();
    }
}

#[test]
fn what_a_word_knew_its_bytes_know() {
    for mut launch in both() {
        launch.write(by(0), 8).unwrap();
        launch.store(by(1).width(1), &[(0, 5)], &[[1; 16]; 32]).unwrap();
        fault(launch.load(by(1).width(1), &[(0, 11)]), Class::Race, &["warp 0"]);
    }
}

#[test]
fn wide_accesses_meet_narrow_ones_in_every_word() {
    for word in 0..4 {
        for mut launch in both() {
            launch.store(by(0), &[(9, 16 + 4 * word)], &[[1; 16]; 32]).unwrap();
            launch.load(by(1).width(16), &[(0, 0), (1, 32)]).unwrap();
            let f = fault(
                launch.load(by(1).width(16), &[(0, 0), (1, 16), (2, 32)]),
                Class::Race,
                &["lane 9 of warp 0"],
            );
            assert_eq!(f.lane, Some(1));
        }
    }
}

#[test]
fn accesses_across_pages_are_seen_whole() {
    let mut launch = Launch::global(4096);
    launch.store(by(0), &[(31, 1024 + 20)], &[[1; 16]; 32]).unwrap();
    let row: Vec<(u32, u64)> = (0..32).map(|lane| (lane, 1008 + u64::from(lane) * 4)).collect();
    let f = fault(launch.load(by(1), &row), Class::Race, &["lane 31 of warp 0"]);
    assert_eq!(f.lane, Some(9));
}

#[test]
fn atomics_meet_atomics_but_not_plain_accesses() {
    for mut launch in both() {
        let atomic = |warp| by(warp).strong(Scope::Device);
        launch.add(atomic(0), &[(0, 8), (1, 8)]).unwrap();
        launch.add(atomic(1), &[(0, 8)]).unwrap();
        launch.read(atomic(2), 8).unwrap();
        launch.write(atomic(2), 8).unwrap();
        fault(launch.read(by(3), 8), Class::Race, &["wrote"]);
        fault(launch.write(by(1), 8), Class::Race, &[]);
        launch.clocks.barrier(0, 0, 0b1111);
        launch.write(by(3), 8).unwrap();
        fault(launch.add(atomic(0), &[(0, 8)]), Class::Race, &["warp 3"]);
        launch.add(atomic(3), &[(0, 8)]).unwrap();
        // Its own atomic does not hide the plain write before it.
        fault(launch.add(atomic(0), &[(0, 8)]), Class::Race, &["warp 3"]);
    }
}

#[test]
fn a_read_does_not_hide_an_atomic() {
    let mut launch = Launch::global(64);
    let strong = |warp| by(warp).strong(Scope::Device);
    launch.add(strong(0), &[(0, 8)]).unwrap();
    launch.add(strong(4), &[(0, 8)]).unwrap();
    launch.read(strong(0), 8).unwrap();
    fault(launch.read(by(4), 8), Class::Race, &["block 0 wrote it"]);
}

#[test]
fn strong_accesses_meet_only_within_their_scope() {
    let mut launch = Launch::global(64);
    launch.add(by(0).strong(Scope::Block), &[(0, 8)]).unwrap();
    launch.add(by(1).strong(Scope::Block), &[(0, 8)]).unwrap();
    fault(launch.add(by(4).strong(Scope::Device), &[(0, 8)]), Class::Race, &["block 1", "block 0"]);
    launch.add(by(4).strong(Scope::Device), &[(0, 12)]).unwrap();
    launch.add(by(8).strong(Scope::Device), &[(0, 12)]).unwrap();
    fault(launch.add(by(0).strong(Scope::Block), &[(0, 12)]), Class::Race, &[]);
}

#[test]
fn blocks_are_ordered_by_no_barrier() {
    let mut launch = Launch::global(64);
    launch.write(by(0), 8).unwrap();
    launch.clocks.barrier(0, 0, 0b1111);
    launch.clocks.barrier(1, 0, 0b1111);
    fault(launch.read(by(4), 8), Class::Race, &["block 1", "block 0"]);
}

#[test]
fn nothing_is_checked_when_the_race_check_is_off() {
    for mut launch in both() {
        launch.check.race = false;
        launch.write(by(0), 8).unwrap();
        launch.write(by(1), 8).unwrap();
    }
}

#[test]
fn nc_loads_read_what_earlier_operations_wrote() {
    let mut launch = Launch::global(64);
    let nc = |warp| Access { non_coherent: true, ..by(warp) };
    launch.read(nc(0), 8).unwrap();
    launch.write(by(0), 12).unwrap();
    launch.clocks.barrier(0, 0, 0b1111);
    fault(launch.read(nc(1), 12), Class::ReadOnly, &["by .nc", "wrote it at inst #0"]);
}

#[test]
fn operations_need_an_order() {
    let mut memory = Memory::new(0, 4096);
    let at = memory.alloc(2048).unwrap();
    // Host: ordinal 0; streams: 1 and 2.
    memory.write(at, &[1; 2048], &OpOrder::new(10, 1, 1, vec![])).unwrap();
    memory.read(at, &mut [0; 9], &OpOrder::new(11, 2, 1, vec![0, 1]), true).unwrap();
    let tells = ["operation #12 reads", "operation #10 wrote"];
    fault(
        memory.read(at, &mut [0; 9], &OpOrder::new(12, 0, 1, vec![0, 0]), true),
        Class::StreamRace,
        &tells,
    );
    let tells = ["operation #13 writes", "operation #11 read"];
    fault(memory.fill(at, &[1], 4, &OpOrder::new(13, 1, 2, vec![0, 1])), Class::StreamRace, &tells);
    memory.fill(at + 12, &[1], 4, &OpOrder::new(14, 1, 3, vec![0, 2])).unwrap();
    memory.fill(at, &[1], 2048, &OpOrder::new(15, 1, 4, vec![0, 3, 1])).unwrap();
}

#[test]
fn a_launch_needs_an_order_after_copies_and_other_launches() {
    let mut launch = Launch::global(64);
    launch.clocks = Clocks::new(&OpOrder::new(7, 1, 1, vec![0]), 4, 4);
    let tells =
        ["lane 0 of warp 0 in block 0", "operation #1 wrote it", "this launch, operation #7"];
    let f = fault(launch.read(by(0), 8), Class::StreamRace, &tells);
    assert_eq!(f.other_inst, None);
    launch.clocks = Clocks::new(&OpOrder::new(8, 1, 2, vec![1]), 4, 4);
    launch.write(by(0), 8).unwrap();
    launch.add(by(0).strong(Scope::Device), &[(0, 16)]).unwrap();
    launch.clocks = Clocks::new(&OpOrder::new(9, 2, 1, vec![1]), 4, 4);
    fault(launch.read(by(0), 8), Class::StreamRace, &["operation #8"]);
    launch.add(by(0).strong(Scope::Device), &[(0, 16)]).unwrap();
    fault(launch.add(by(0).strong(Scope::Block), &[(0, 16)]), Class::StreamRace, &["operation #8"]);
    let Target::Global(memory, at) = &mut launch.target else { unreachable!() };
    fault(memory.read(*at + 8, &mut [0], &op(3), true), Class::StreamRace, &["operation #8 wrote"]);
}

#[test]
fn bytes_of_an_outstanding_cp_async_are_nobodys() {
    let values = [[9; 16]; 32];
    let mut launch = Launch::shared();
    let lanes: Vec<(u32, u64)> = (0..4).map(|lane| (lane, u64::from(lane) * 16)).collect();
    let begin = |launch: &mut Launch, warp| {
        launch.request(by(warp).width(16).inst(3), &lanes, |launch, r| {
            let Target::Shared(region) = &mut launch.target else { unreachable!() };
            region.begin_async(r, &mut launch.clocks, ALL)
        })
    };
    let finish = |launch: &mut Launch, warp| {
        launch.request(by(warp).width(16).inst(4), &lanes, |launch, r| {
            let Target::Shared(region) = &mut launch.target else { unreachable!() };
            region.finish_async(r, &mut launch.clocks, ALL, &values)
        })
    };
    begin(&mut launch, 0).unwrap();
    fault(launch.load(by(0), &[(2, 36)]), Class::AsyncNotWaited, &["`tile` byte 36", "cp.async"]);
    fault(launch.write(by(0), 4), Class::Race, &["cp.async"]);
    fault(begin(&mut launch, 0), Class::Race, &["cp.async"]);
    finish(&mut launch, 0).unwrap();
    assert_eq!(launch.load(by(0), &[(2, 36)]).unwrap()[2][..4], [9; 4]);
    fault(launch.load(by(1), &[(2, 36)]), Class::Race, &["wrote it at inst #4"]);
    fault(launch.load(by(0), &[(0, 36)]), Class::Race, &["lane 2 of warp 0"]);
    launch.clocks.barrier(0, 0, 0b11);
    launch.load(by(1), &[(2, 36)]).unwrap();
    fault(begin(&mut launch, 0), Class::Race, &["warp 1 in block 0 read it"]);
    launch.clocks.barrier(0, 0, 0b11);
    begin(&mut launch, 0).unwrap();
}
