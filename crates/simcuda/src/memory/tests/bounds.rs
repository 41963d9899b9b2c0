//! Bounds, lifetime, alignment, initialisation, and that the right bytes move.

use super::*;

fn row(first: u64, step: u64) -> Vec<(u32, u64)> {
    (0..32).map(|lane| (lane, first + u64::from(lane) * step)).collect()
}

#[test]
fn lanes_move_their_own_bytes_whatever_the_pattern() {
    for width in [1, 2, 4, 8, 16] {
        let w = width as usize;
        let values: Lanes =
            std::array::from_fn(|lane| std::array::from_fn(|byte| (lane * 16 + byte) as u8));
        let mut scattered = row(0, 48);
        scattered.rotate_left(5);
        for lanes in [row(64, u64::from(width)), row(1024, 32), scattered[..20].to_vec()] {
            let mut launch = Launch::global(4096);
            launch.store(by(0).width(width), &lanes, &values).unwrap();
            launch.clocks.warp_sync(0);
            let read = launch.load(by(0).width(width), &lanes).unwrap();
            for (lane, at) in &lanes {
                let lane = *lane as usize;
                assert_eq!(read[lane][..w], values[lane][..w]);
                assert_eq!(read[lane][w..], [0; 16][w..]);
                let Target::Global(memory, base) = &mut launch.target else { unreachable!() };
                let mut host = vec![0; w];
                memory.read(*base + at, &mut host, &op(3), true).unwrap();
                assert_eq!(host, values[lane][..w]);
            }
        }
        let mut launch = Launch::global(64);
        launch.store(by(0).width(width), &[(9, 16)], &values).unwrap();
        launch.clocks.warp_sync(0);
        let read = launch.load(by(0).width(width), &row(16, 0)).unwrap();
        assert!(read.iter().all(|lane| lane[..w] == values[9][..w]), "all lanes read one value");
    }
}

#[test]
fn atomics_apply_lane_by_lane() {
    for width in [2, 4, 8] {
        let mut launch = Launch::global(64);
        let old = launch.add(by(0).width(width).strong(Scope::Device), &row(8, 0)).unwrap();
        assert_eq!(old, std::array::from_fn(|lane| lane as u64));
    }
}

#[test]
fn lanes_may_be_in_different_allocations() {
    let mut launch = Launch::global(64);
    let Target::Global(memory, first) = &mut launch.target else { unreachable!() };
    let second = memory.alloc(64).unwrap();
    memory.write(second, &[5; 64], &op(1)).unwrap();
    let second = second - *first;
    let read = launch.load(by(0), &[(0, 60), (1, second), (2, 4), (3, second + 60)]).unwrap();
    assert_eq!(read.map(|lane| lane[0])[..4], [0, 5, 0, 5]);
}

#[test]
fn past_the_end_names_the_allocation_and_the_distance() {
    let mut launch = Launch::global(100);
    launch.read(by(0), 96).unwrap();
    let f = fault(
        launch.load(by(0), &row(0, 4)),
        Class::OutOfBounds,
        &["starts 0 bytes past the end of the allocation"],
    );
    assert_eq!(f.lane, Some(25));
    fault(
        launch.read(by(0), 120),
        Class::OutOfBounds,
        &["starts 20 bytes past the end of the allocation of 100 bytes"],
    );
    fault(launch.write(by(0).width(8), 96), Class::OutOfBounds, &["reaches 4 bytes past the end"]);
    fault(
        launch.read(by(0), 8u64.wrapping_neg()),
        Class::OutOfBounds,
        &["starts 8 bytes before the allocation"],
    );
    fault(launch.read(by(0), 1 << 50), Class::OutOfBounds, &["past the end"]);
}

#[test]
fn host_copies_end_with_their_allocation() {
    let mut memory = Memory::new(0, 1000);
    let (a, b) = (memory.alloc(100).unwrap(), memory.alloc(100).unwrap());
    assert!(a % 512 == 0 && b % 512 == 0 && b >= a + 100 + 512);
    memory.write(a, &[1; 100], &op(1)).unwrap();
    fault(
        memory.write(a, &[1; 101], &op(1)),
        Class::OutOfBounds,
        &["reaches 1 bytes past the end"],
    );
    fault(memory.fill(a + 50, &[1, 2], 26, &op(1)), Class::OutOfBounds, &["reaches 2 bytes past"]);
    fault(memory.read(a + 1, &mut [0; 100], &op(1), false), Class::OutOfBounds, &[]);
    fault(memory.copy(b, a, 101, &op(1)), Class::OutOfBounds, &[]);
    memory.copy(b, a, 0, &op(1)).unwrap();
    memory.write(a + 100, &[], &op(1)).unwrap();
}

#[test]
fn capacity_is_live_bytes_and_addresses_are_used_once() {
    let mut memory = Memory::new(0, 1000);
    let first = memory.alloc(600).unwrap();
    assert_eq!((memory.alloc(600), memory.used(), memory.capacity()), (None, 600, 1000));
    assert_eq!(memory.containing(first + 599), Some((first, 600)));
    assert_eq!(memory.containing(first + 600), None);
    assert_eq!(memory.free(first).unwrap(), 600);
    let second = memory.alloc(600).unwrap();
    assert_ne!(first, second);
    assert_eq!(memory.containing(first), None);
    assert_eq!(memory.live().collect::<Vec<_>>(), [(second, 600)]);
    fault(
        memory.read(first, &mut [0], &op(1), false),
        Class::UseAfterFree,
        &["byte 0 of the freed allocation of 600"],
    );
    fault(memory.free(first), Class::UseAfterFree, &["freed before"]);
    fault(memory.free(second + 8), Class::OutOfBounds, &["inside the allocation of 600 bytes"]);
    fault(memory.free(77), Class::OutOfBounds, &["no allocation"]);
}

#[test]
fn a_kernel_that_uses_freed_memory_is_stopped() {
    let mut launch = Launch::global(64);
    let Target::Global(memory, at) = &mut launch.target else { unreachable!() };
    memory.free(*at).unwrap();
    let f = fault(
        launch.load(by(3), &[(7, 32)]),
        Class::UseAfterFree,
        &["byte 32 of the freed allocation of 64 bytes"],
    );
    assert_eq!(f.lane, Some(7));
}

#[test]
fn more_than_one_reservation_can_be_used_up() {
    let mut memory = Memory::new(63, u64::MAX);
    let mut last = 0;
    for _ in 0..5 {
        // Never touched, so it takes no memory. Machines that refuse to promise so much say so here.
        let Some(at) = memory.alloc(60 << 30) else { return };
        memory.free(at).unwrap();
        assert_ne!(at, last);
        last = at;
    }
    fault(memory.free(last), Class::UseAfterFree, &[]);
}

#[test]
fn addresses_are_multiples_of_the_width() {
    let mut launch = Launch::global(64);
    launch.read(by(0).width(16), 32).unwrap();
    let f =
        fault(launch.load(by(0).width(16), &[(0, 16), (1, 40)]), Class::Misaligned, &["16 bytes"]);
    assert_eq!(f.lane, Some(1));
    fault(launch.write(by(0).width(2), 1), Class::Misaligned, &[]);
}

#[test]
fn shared_variables_are_apart() {
    let mut launch = Launch::shared();
    launch.write(by(0), 60).unwrap();
    launch.write(by(0), 80).unwrap();
    launch.write(by(0).width(8), 136).unwrap();
    fault(
        launch.write(by(0), 64),
        Class::OutOfBounds,
        &["4 bytes past the end of `tile` (64 bytes)"],
    );
    fault(launch.write(by(0), 76), Class::OutOfBounds, &["4 bytes before `sums`"]);
    fault(launch.write(by(0), 144), Class::OutOfBounds, &["past the end of `sums`"]);
    launch.clocks.warp_sync(0);
    let f = fault(
        launch.store(by(0), &row(0, 4), &[[0; 16]; 32]),
        Class::OutOfBounds,
        &["shared offset 64"],
    );
    assert_eq!(f.lane, Some(16));
}

#[test]
fn local_memory_is_each_lanes_own() {
    let mut region = Region::local(24);
    let mut clocks = Clocks::new(&op(1), 1, 1);
    let mut launch = |lanes: &[(u32, u64)], values: Option<&Lanes>| {
        let (mut addresses, mut mask) = ([0; 32], 0);
        lanes
            .iter()
            .for_each(|(lane, at)| (addresses[*lane as usize], mask) = (*at, mask | 1 << lane));
        let (addresses, order) = (&addresses, Order::Weak);
        let (acquire, release, non_coherent) = (false, false, false);
        let r = Request {
            mask,
            addresses,
            width: 8,
            order,
            acquire,
            release,
            warp: 0,
            inst: 0,
            non_coherent,
        };
        let mut out = [[0; 16]; 32];
        match values {
            Some(values) => region.store(&r, &mut clocks, ALL, values),
            None => region.load(&r, &mut clocks, ALL, &mut out),
        }
        .map(|()| out)
    };
    let values: Lanes = std::array::from_fn(|lane| [lane as u8; 16]);
    launch(&row(16, 0), Some(&values)).unwrap();
    let read = launch(&row(16, 0), None).unwrap();
    assert!((0..32).all(|lane| read[lane][..8] == [lane as u8; 8]));
    fault(launch(&[(3, 8)], None), Class::Uninitialised, &["local offset 8"]);
    fault(
        launch(&[(3, 24)], None),
        Class::OutOfBounds,
        &["past the end of the thread's 24 bytes of local memory"],
    );
}

#[test]
fn bytes_nobody_wrote_are_not_read() {
    let mut launch = Launch::shared();
    launch.store(by(0).width(1), &[(0, 0), (1, 1), (2, 3)], &[[1; 16]; 32]).unwrap();
    launch.clocks.warp_sync(0);
    launch.load(by(0).width(2), &[(5, 0)]).unwrap();
    let tells = ["reads 4 bytes; the 1 from shared `tile` byte 2 on were never written"];
    let f = fault(launch.load(by(0), &[(5, 0)]), Class::Uninitialised, &tells);
    assert_eq!(f.lane, Some(5));
    fault(
        launch.add(by(0).strong(Scope::Block), &[(1, 80)]),
        Class::Uninitialised,
        &["`sums` byte 0"],
    );
    launch.check.init = false;
    launch.load(by(0), &[(5, 0)]).unwrap();
}

#[test]
fn the_next_block_finds_nothing_initialised_and_no_races() {
    let mut launch = Launch::shared();
    launch.write(by(0), 0).unwrap();
    let Target::Shared(region) = &mut launch.target else { unreachable!() };
    region.reset();
    fault(launch.read(by(5), 0), Class::Uninitialised, &[]);
    launch.write(by(5), 0).unwrap();
    launch.read(by(5), 0).unwrap();
}

#[test]
fn copies_take_along_what_was_not_written() {
    let mut memory = Memory::new(0, 4096);
    let (a, b) = (memory.alloc(1000).unwrap(), memory.alloc(1000).unwrap());
    memory.write(a + 100, &[1; 300], &op(1)).unwrap();
    memory.copy(b + 33, a + 90, 320, &op(2)).unwrap();
    memory.read(b + 43, &mut [0; 300], &op(3), true).unwrap();
    fault(memory.read(b + 42, &mut [0; 300], &op(3), true), Class::Uninitialised, &["the 1 bytes"]);
    fault(memory.read(b + 44, &mut [0; 300], &op(3), true), Class::Uninitialised, &[]);
    memory.read(b, &mut [0; 1000], &op(3), false).unwrap();
    let numbers: Vec<u8> = (0..100).collect();
    memory.write(a, &numbers, &op(4)).unwrap();
    memory.copy(a + 10, a, 90, &op(5)).unwrap();
    let mut moved = [0; 90];
    memory.read(a + 10, &mut moved, &op(6), true).unwrap();
    assert_eq!(moved, numbers[..90]);
}

#[test]
fn the_host_cannot_touch_device_addresses() {
    let mut memory = Memory::new(1, 4096);
    let at = memory.alloc(4096).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let range = |line: &str| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?)
    };
    let line = maps
        .lines()
        .find(|line| range(line).is_some_and(|range| range.contains(&at)))
        .expect("mapped");
    assert!(line.contains("---p"), "{line}");
}
